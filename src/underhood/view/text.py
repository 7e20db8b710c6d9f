"""View -> terminal: a rich renderable for people, tab-separated values for programs.

In a terminal the same rules hold as on the page: signs are printed, blue is positive, missing
values are a dash. What does not fit is summarised (the strongest cells, a small curve), never cut
off without saying so. Control characters in tokens are written out, so a prompt cannot drive the
terminal; rich markup in them is not interpreted.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from underhood.view import text_kinds, text_panels
from underhood.view.doc import Group, View
from underhood.view.flat import Cell, flatten
from underhood.view.markup import visible
from underhood.view.number import plain
from underhood.view.rescale import rescaled, share_scale
from underhood.view.text_kinds import visible_line

if TYPE_CHECKING:
    from rich.console import RenderableType

DRAW: dict[str, Callable[[Any], Any]] = {
    "sentences": text_kinds.sentences,
    "tokens": text_kinds.tokens,
    "texts": text_kinds.texts,
    "table": text_kinds.table,
    "grid": text_kinds.grid,
    "heads": text_kinds.heads,
    "bars": text_kinds.bars,
    "lines": text_kinds.lines,
    "timeline": text_panels.timeline,
    "graph": text_panels.graph,
    "tree": text_panels.tree,
    "picture": text_panels.picture,
    "feature": text_panels.feature,
    "bench": text_panels.bench,
    "diff": text_panels.diff,
}
"""The picture of each kind in characters."""


def to_text(view: View) -> "RenderableType":
    """The view as a rich renderable, with title, picture in characters, and control."""
    from rich.console import Group as Stack
    from rich.text import Text

    parts: list[RenderableType] = []
    if view.title:
        parts.append(Text(visible_line(view.title), style="bold"))
    if view.about:
        parts.append(Text(visible_line(view.about), style="dim"))
    control = view.control
    if control is not None:
        view, control = share_scale(view, control)
    view = rescaled(view)
    parts += _group(view) if isinstance(view, Group) else [DRAW[view.kind](view)]
    if control is not None:
        parts += [Text("control", style="italic dim"), to_text(control)]
    return Stack(*parts)


def _group(view: Group) -> "list[RenderableType]":
    from rich.text import Text

    if view.folded:
        names = ", ".join(inner.title or inner.kind for inner in view.views)
        return [Text(f"folded: {visible_line(names)}", style="dim")]
    return [part for inner in view.views for part in (Text(""), to_text(inner))]


def to_string(view: View, *, width: int = 100) -> str:
    """The same picture as uncoloured text, `width` characters wide."""
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(to_text(view))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def to_plain(view: View) -> str:
    """The numbers as tab-separated values: a `# title` line, a header, then one line per row."""
    blocks = []
    for flat in flatten(view):
        lines = [f"# {visible_line(flat.title)}"] if flat.title else []
        lines.append("\t".join(visible(name) for name in flat.header))
        lines += ["\t".join(_plain_cell(cell) for cell in row) for row in flat.rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _plain_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return visible(cell)
    return plain(cell) if isinstance(cell, float) else str("" if cell is None else cell)
