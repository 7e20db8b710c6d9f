"""The house: imports go down only, files and functions stay small.

Read from the source with `ast`, function-level imports included; nothing is imported.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "underhood"

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "view": {"core"},
    "circuits": {"core", "data"},
    "organisms": {"core", "data", "circuits"},
    "store": {"core", "data"},
    "dictionary": {"core", "data", "store"},
    "methods": {"core", "data", "circuits", "view", "organisms", "store", "dictionary"},
}
"""What the code of each floor may import besides itself; everything above sees all below."""

FLOORS = tuple(ALLOWED)
TOP = {"__init__", "loader", "fronts", "coverage", "bench", "notebook"}
"""Modules beside the floors: they put the floors together and belong to none."""
ABOVE = {"explain": {*FLOORS, "explanation", "loader"}, "explanation": {*FLOORS, "loader"}}
SURFACES = {"cli", "workbench"}

HARD_LINES, SOFT_LINES, FUNCTION_LINES = 700, 400, 60


def files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(SOURCE.rglob("*.py"))


def part(path: Path) -> str:
    """The floor or the top module that a file belongs to."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of our own package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.startswith("underhood"))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                here = ["underhood", *path.relative_to(SOURCE).with_suffix("").parts]
                module = ".".join([*here[: len(here) - node.level], *([module] if module else [])])
            if module == "underhood":  # the package itself knows every floor
                yield from ((node.lineno, f"underhood.{a.name}") for a in node.names)
            elif module.startswith("underhood."):
                yield node.lineno, module


def allowed(home: str) -> set[str] | None:
    """What a part may import besides itself; None: anything."""
    if home in ALLOWED:
        return ALLOWED[home]
    if home in ABOVE:
        return ABOVE[home]
    return None


def test_every_part_has_its_place() -> None:
    known = {*ALLOWED, *ABOVE, *SURFACES, *TOP}
    assert {part(p) for p in files()} <= known, "say in this test where the new part belongs"


def test_the_table_goes_down_only() -> None:
    for home, below in ALLOWED.items():
        for other in below:
            assert home not in ALLOWED[other], f"{home} and {other} import each other"


@pytest.mark.parametrize("home", sorted({*ALLOWED, *ABOVE}))
def test_imports_go_down(home: str) -> None:
    may = allowed(home)
    assert may is not None
    wrong = []
    for path in (p for p in files() if part(p) == home):
        for line, name in imports(path):
            target = name.split(".")[1] if "." in name else "underhood"
            if target != home and target not in may:
                wrong.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nobody_below_imports_a_surface() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {name}"
        for path in files()
        if part(path) not in SURFACES
        for line, name in imports(path)
        if name.split(".")[1:2] and name.split(".")[1] in SURFACES
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    sizes = {
        str(p.relative_to(SOURCE)): len(p.read_text(encoding="utf-8").splitlines()) for p in files()
    }
    over = {name: n for name, n in sizes.items() if n > HARD_LINES}
    assert not over, f"longer than {HARD_LINES} lines: {over}"


def long_functions() -> dict[str, int]:
    """Functions of more than 60 lines, docstring not counted."""
    found = {}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            if length > FUNCTION_LINES:
                found[f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"] = length
    return found


def test_functions_are_short() -> None:
    found = long_functions()
    assert not found, f"longer than {FUNCTION_LINES} lines: {found}"


def test_no_machine_paths() -> None:
    """Nothing in the package names a place on somebody's machine."""
    for path in files():
        text = path.read_text(encoding="utf-8")
        for mark in ("/work/", "/home/", "/Users/", "C:\\"):
            assert mark not in text, f"{path.relative_to(SOURCE)} holds {mark!r}"
