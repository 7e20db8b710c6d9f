"""View -> terminal: a rich renderable for people, tab-separated values for programs.

In a terminal the same rules hold as on the page: signs are printed, blue is positive, missing
values are a dash. What does not fit is summarised (the strongest cells, a small curve), never cut
off without saying so. Control characters in tokens are written out, so a prompt cannot drive the
terminal; rich markup in them is not interpreted.
"""

from typing import TYPE_CHECKING

import numpy as np

from underhood.view.colour import Limits, cell_colour, ink, limits_of
from underhood.view.doc import (
    Bars,
    Grid,
    Group,
    Heads,
    Lines,
    Sentences,
    Table,
    Texts,
    Tokens,
    View,
)
from underhood.view.draw_grid import strongest
from underhood.view.draw_words import cell_text, column_decimals
from underhood.view.flat import Cell, flatten
from underhood.view.markup import visible
from underhood.view.number import decimals_for, plain, show
from underhood.view.rescale import bar_span, rescaled, share_scale

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as RichTable
    from rich.text import Text

_GRID_COLS = 12  # a wider grid becomes a list of its strongest cells
_GRID_ROWS = 48
_STRONGEST = 12
_BAR_WIDTH = 24
_SPARK = "▁▂▃▄▅▆▇█"


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
    match view:
        case Sentences():
            parts += [Text(visible_line(item)) for item in view.items]
        case Tokens():
            parts.append(_tokens(view))
        case Grid():
            parts.append(_grid(view))
        case Bars():
            parts.append(_bars(view))
        case Heads():
            parts.append(_heads(view))
        case Lines():
            parts.append(_lines(view))
        case Table():
            parts.append(_table(view))
        case Texts():
            parts.append(_texts(view))
        case Group(folded=True):
            names = ", ".join(inner.title or inner.kind for inner in view.views)
            parts.append(Text(f"folded: {visible_line(names)}", style="dim"))
        case Group():
            for inner in view.views:
                parts += [Text(""), to_text(inner)]
    if control is not None:
        parts += [Text("control", style="italic dim"), to_text(control)]
    return Stack(*parts)


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


def visible_line(text: str) -> str:
    """Text on one line without control characters; inner spaces stay spaces."""
    return " ".join(visible(word) for word in text.split()) if text else ""


def _plain_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return visible(cell)
    return plain(cell) if isinstance(cell, float) else str("" if cell is None else cell)


def _paint(value: float | None, limits: Limits) -> str:
    if value is None:
        return "dim"
    back = cell_colour(value, limits)
    return f"{ink(back)} on {back}"


def _plain_table(*, header: bool = True) -> "RichTable":
    from rich.table import Table as RichTable

    return RichTable(box=None, show_header=header, pad_edge=False, header_style="dim")


def _under(table: "RichTable", note: str) -> "RenderableType":
    """The table with a remark below; rich's own captions break at the table's width."""
    from rich.console import Group as Stack
    from rich.text import Text

    return Stack(table, Text(visible_line(note), style="dim")) if note else table


def _tokens(view: Tokens) -> "Text":
    from rich.text import Text

    if view.values is None:
        return Text(" ").join([Text(visible(token)) for token in view.tokens])
    limits = limits_of(view.values, view.scale, view.limit)
    decimals = decimals_for([limits.high])
    signed = view.scale == "diverging"
    chips = []
    for token, value in zip(view.tokens, view.values, strict=True):
        chip = Text(visible(token), style=_paint(value, limits))
        chips.append(chip.append(f" {show(value, decimals, signed=signed)}", style="not bold"))
    return Text("  ").join(chips).append(f"  {view.unit}", style="dim")


def _grid(view: Grid) -> "RenderableType":
    from rich.text import Text

    limits = limits_of(view.values, view.scale, view.limit)
    decimals, signed = decimals_for([limits.high]), view.scale == "diverging"
    if len(view.cols) > _GRID_COLS or len(view.rows) > _GRID_ROWS:
        return _strongest_cells(view, limits)
    out = _plain_table()
    out.add_column(Text(_corner(view)), justify="right", style="dim")
    for name in view.cols:
        out.add_column(Text(visible(name)), justify="center")
    marks = set(view.marks)
    for r, (name, line) in enumerate(zip(view.rows, view.values, strict=True)):
        cells = []
        for c, value in enumerate(line):
            words = f"{visible(view.cell_text[r][c])} " if view.cell_text else ""
            text = words + show(value, decimals, signed=signed)
            text = f"[{text}]" if (r, c) in marks else text
            cells.append(Text(text, style=_paint(value, limits)))
        out.add_row(Text(visible(name)), *cells)
    return _under(out, view.unit)


def _corner(view: Grid) -> str:
    names = (visible_line(view.row_name), visible_line(view.col_name))
    return "/".join(name for name in names if name)


def _strongest_cells(view: Grid, limits: Limits) -> "RenderableType":
    """The cells of largest magnitude of a grid that is too wide for a terminal."""
    from rich.text import Text

    data = np.array(view.values, dtype=float).reshape(len(view.rows), len(view.cols))
    order = np.argsort(-np.abs(np.nan_to_num(data)), axis=None)[:_STRONGEST]
    out = _plain_table()
    for name in (view.row_name or "row", view.col_name or "column", view.unit or "value"):
        out.add_column(Text(visible_line(name)), justify="right")
    if view.cell_text:
        out.add_column("")
    for r, c in (divmod(int(i), len(view.cols)) for i in order):
        value = view.values[r][c]
        if value is None:
            continue
        number = show(value, decimals_for([limits.high]), signed=view.scale == "diverging")
        extra = [Text(visible(view.cell_text[r][c]))] if view.cell_text else []
        place = Text(visible(view.rows[r])), Text(f"{visible(view.cols[c])} ({c})")
        out.add_row(*place, Text(number, style=_paint(value, limits)), *extra)
    return _under(out, f"the {out.row_count} strongest of {data.size} cells")


def _bars(view: Bars) -> "RenderableType":
    from rich.text import Text

    low, high = view.span or bar_span(view)
    decimals = decimals_for([*view.values, view.total])
    out = _plain_table(header=False)
    out.add_column(justify="right")
    out.add_column(justify="right")
    out.add_column()
    for i, (label, value) in enumerate(zip(view.labels, view.values, strict=True)):
        number = show(value, decimals, signed=view.signed)
        row = [Text(visible(label)), Text(number), _bar(value, low, high, view.signed)]
        if view.baseline is not None:
            ends = [show(x, decimals, signed=view.signed) for x in view.baseline[i]]
            row[2].append(f"  {visible_line(view.baseline_name)} {ends[0]} to {ends[1]}", "dim")
        out.add_row(*row)
    if view.total is not None:
        number = Text(show(view.total, decimals, signed=view.signed), style="bold")
        out.add_row(Text("total"), number, Text(visible_line(view.total_label), style="dim"))
    return _under(out, view.unit)


def _bar(value: float | None, low: float, high: float, signed: bool) -> "Text":
    from rich.text import Text

    if value is None:
        return Text("")
    zero = round((0 - low) / (high - low) * _BAR_WIDTH)
    at = round((min(max(value, low), high) - low) / (high - low) * _BAR_WIDTH)
    first, last = max(min(zero, at), 0), min(max(zero, at), _BAR_WIDTH)
    colour = "#b2182b" if value < 0 else ("#2166ac" if signed else "#c8650f")
    bar = Text(" " * first).append("█" * (last - first) or "▏", style=colour)
    return bar.append(" " * (_BAR_WIDTH - last))


def _heads(view: Heads) -> "RenderableType":
    from rich.text import Text

    out = Text()
    n = len(view.tokens)
    for i, head in enumerate(view.heads):
        out.append("\n" if i else "").append(visible_line(head.label), style="bold")
        out.append(f"  {visible_line(head.note)}", style="dim")
        for q, k, weight in strongest(np.array(head.pattern, dtype=float).reshape(n, n)):
            names = f"{visible(view.tokens[q])} ({q}) looks at {visible(view.tokens[k])} ({k})"
            out.append(f"\n  {names}: {weight}")
    return out


def _lines(view: Lines) -> "RenderableType":
    from rich.text import Text

    out = _plain_table()
    for name in (view.y_name or "series", "", "first", "last", "lowest", "highest"):
        out.add_column(Text(visible_line(name)), justify="left" if not name else "right")
    for line in view.series:
        known = [v for v in line.values if v is not None]
        digits = decimals_for(known)
        ends = [known[0], known[-1], min(known), max(known)] if known else [None] * 4
        numbers = [Text(show(v, digits, signed=False)) for v in ends]
        out.add_row(Text(visible_line(line.name)), Text(_spark(line.values)), *numbers)
    span = f"{view.x_name} {view.x[0]} to {view.x[-1]}" if view.x else ""
    return _under(out, span)


def _spark(values: list[float | None], width: int = 40) -> str:
    """The curve in eight heights; a dot where there is no value."""
    step = -(-len(values) // width) if values else 1
    thin = values[::step]
    known = [v for v in thin if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join("·" if v is None else _SPARK[round((v - low) * scale)] for v in thin)


def _table(view: Table) -> "RenderableType":
    from rich.text import Text

    out = _plain_table()
    for i, column in enumerate(view.columns):
        cells = [row[i] for row in view.rows]
        right = any(isinstance(cell, int | float) for cell in cells)
        name = f"{column.name} {column.unit}".rstrip()
        out.add_column(Text(visible_line(name)), justify="right" if right else "left")
    digits = [column_decimals(view, i) for i in range(len(view.columns))]
    for row in view.rows:
        cells = [cell_text(c, view.columns[i], digits[i]) for i, c in enumerate(row)]
        out.add_row(*[Text(visible(cell)) for cell in cells])
    return out


def _texts(view: Texts) -> "RenderableType":
    from rich.text import Text

    limits = limits_of([], "probability")
    out = Text()
    for i, column in enumerate(view.columns):
        out.append("\n" if i else "").append(visible_line(column.label), style="bold")
        out.append(f"  {visible_line(column.note)}\n  ", style="dim")
        values = column.values or [None] * len(column.tokens)
        for token, value in zip(column.tokens, values, strict=True):
            style = _paint(value, limits) if value is not None else ""
            out.append(visible(token).replace("·", " "), style=style)
        known = [v for v in values if v is not None]
        if known:
            mean = show(sum(known) / len(known), 3, signed=False)
            out.append(f"\n  mean probability {mean}", style="dim")
    return out
