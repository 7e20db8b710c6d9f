"""The docs say what the code does: README's Python runs, its commands and links exist."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's Python, line by line; where a comment gives a shape, it is that shape."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    for line in code.splitlines():
        exec(line, scope)
        if match := re.match(r"(run\[.*\]\.shape)\s+# (\([\d, ]+\))", line):
            assert str(tuple(eval(match[1], scope))) == match[2]
    assert "resid_pre" in capsys.readouterr().out


def test_commands_exist() -> None:
    from underhood.cli.app import app

    (listed,) = re.findall(r"## Commands\n\n(.*?)\. All that", README, re.DOTALL)
    for command in re.findall(r"`(\w+)", listed):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_changelog_names_every_method() -> None:
    from underhood.methods import names

    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for family in names().values():
        for name in family:
            assert f"`{name}`" in changes, name


def test_every_method_has_a_whole_card() -> None:
    """Summary, meaning of each parameter, cost, source, limits, example: nothing is left out."""
    from underhood.methods import find, names

    for family in names().values():
        for name in family:
            card = find(name)
            assert card.summary.endswith("."), name
            for section in ("Args", "Returns", "Cost", "Source", "Misleads", "Example"):
                assert card.sections.get(section), f"{name}: {section}"
            for parameter in card.parameters:
                assert parameter.about, f"{name}: {parameter.name}"


EXAMPLES = sorted(
    str(path.relative_to(SOURCES).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in SOURCES.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 20


@pytest.mark.parametrize("module", EXAMPLES)
def test_docstring_examples_run(module: str) -> None:
    """On the built-in model."""
    found = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert found.attempted and not found.failed


def test_the_page_of_organisms_is_current() -> None:
    from underhood.organisms.page import PAGE, page

    found = (Path(__file__).parents[1] / PAGE).read_text(encoding="utf-8")
    assert found == page(), "run `underhood organisms list --write`"
