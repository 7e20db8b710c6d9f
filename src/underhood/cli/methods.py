"""`underhood methods`: what methods there are, and the card of one."""

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from underhood.cli import options, render

if TYPE_CHECKING:
    from underhood.methods.registry import Method

__all__ = ["methods"]

_SHOWN = ("Cost", "Source", "Misleads", "Returns", "Raises")


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show the card of this method.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List the methods; with a name, show its card: what it reads, its options, cost and source."""
    from underhood.methods.registry import find, names

    if name is not None:
        method = find(name)
        render.document(_card(method)) if json else _show(method)
        return
    rows = [(f, n, _summary(f, n)) for f, found in names().items() for n in found]
    columns = ("family", "name", "summary")
    if json:
        render.document([dict(zip(columns, row, strict=True)) for row in rows])
        return
    render.table(columns, rows)
    if render.terminal():
        render.note(f"{len(rows)} methods; `underhood methods NAME` shows the card of one")


def _summary(family: str, name: str) -> str:
    """`find(name).summary`, read from the file: a list must not import every method."""
    from underhood.methods import registry

    path = Path(registry.__file__).parent / family / f"{name}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _parameters(method: "Method") -> list[dict[str, Any]]:
    from underhood.cli.arguments import data_flags, type_name
    from underhood.methods.registry import REQUIRED

    return [
        {
            "name": p.name,
            "how": f"--set {p.name}=" if p.option else data_flags(p) or "from Python only",
            "type": type_name(p.type),
            "default": None if p.default is REQUIRED else p.default,
            "required": p.default is REQUIRED,
            "about": p.about,
        }
        for p in method.parameters
    ]


def _card(method: "Method") -> dict[str, Any]:
    from underhood.view.clean import clean

    sections = {name.lower() or "text": text for name, text in method.sections.items()}
    head = {"name": method.name, "family": method.family, "summary": method.summary}
    return clean(head | {"parameters": _parameters(method), "sections": sections})


def _show(method: "Method") -> None:
    sections = method.sections
    render.heading(f"{method.family}.{method.name}")
    typer.echo(sections[""])
    found = _parameters(method)
    typer.echo("")
    columns = ("name", "given by", "type", "default", "meaning")
    rows = []
    for p in found:
        default = "required" if p["required"] else _default(p["default"])
        rows.append((p["name"], p["how"], p["type"], default, p["about"]))
    render.table(columns, rows)
    for name in (n for n in _SHOWN if n in sections):
        typer.echo("")
        render.heading(name)
        typer.echo(sections[name])
    if "Example" in sections:
        typer.echo("")
        render.heading("From Python")
        typer.echo(sections["Example"])


def _default(value: object) -> str:
    return "none" if value is None else str(value) if not isinstance(value, str) else value or '""'
