"""The plain kinds in characters; see `text` for the rules."""

from typing import TYPE_CHECKING

import numpy as np

from underhood.view.colour import Limits, cell_colour, ink, limits_of
from underhood.view.doc import Bars, Grid, Heads, Lines, Sentences, Table, Texts, Tokens
from underhood.view.draw_grid import strongest
from underhood.view.draw_words import cell_text, column_decimals
from underhood.view.markup import visible
from underhood.view.number import decimals_for, show
from underhood.view.rescale import bar_span

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as RichTable
    from rich.text import Text

_GRID_COLS = 12  # a wider grid becomes a list of its strongest cells
_GRID_ROWS = 48
_STRONGEST = 12
_BAR_WIDTH = 24
_MOST = 60  # bars and heads; of longer lists the rest is counted
_TABLE_ROWS = 200
_TOKENS = 400  # a longer strip becomes a list of its strongest tokens
_SPARK = "▁▂▃▄▅▆▇█"


def visible_line(text: str) -> str:
    """Text on one line without control characters; inner spaces stay spaces."""
    return " ".join(visible(word) for word in text.split()) if text else ""


def paint(value: float | None, limits: Limits) -> str:
    """The style of a value: its colour, and an ink that reads on it."""
    if value is None:
        return "dim"
    back = cell_colour(value, limits)
    return f"{ink(back)} on {back}"


def plain_table(*, header: bool = True) -> "RichTable":
    """A table without lines."""
    from rich.table import Table as RichTable

    return RichTable(box=None, show_header=header, pad_edge=False, header_style="dim")


def under(table: "RenderableType", note: str) -> "RenderableType":
    """Something with a remark below; rich's own captions break at the table's width."""
    from rich.console import Group as Stack
    from rich.text import Text

    return Stack(table, Text(visible_line(note), style="dim")) if note else table


def _rest(count: int, shown: int) -> str:
    """How many of a long list are not shown."""
    return f"and {count - shown:,} more" if count > shown else ""


def sentences(view: Sentences) -> "RenderableType":
    """One statement per line."""
    from rich.console import Group as Stack
    from rich.text import Text

    return Stack(*[Text(visible_line(item)) for item in view.items])


def tokens(view: Tokens) -> "RenderableType":
    """Tokens with their values, coloured; of very many the strongest."""
    from rich.text import Text

    if view.values is None:
        words = [visible(token) for token in view.tokens[:_TOKENS]]
        return under(Text(" ".join(words)), _rest(len(view.tokens), _TOKENS))
    if len(view.tokens) > _TOKENS:
        same = {"scale": view.scale, "limit": view.limit, "unit": view.unit}
        return grid(Grid(rows=["strip"], cols=view.tokens, values=[view.values], **same))
    limits = limits_of(view.values, view.scale, view.limit)
    decimals = decimals_for([limits.high])
    signed = view.scale == "diverging"
    chips = []
    for token, value in zip(view.tokens, view.values, strict=True):
        chip = Text(visible(token), style=paint(value, limits))
        chips.append(chip.append(f" {show(value, decimals, signed=signed)}", style="not bold"))
    return Text("  ").join(chips).append(f"  {view.unit}", style="dim")


def grid(view: Grid) -> "RenderableType":
    """A heat map: all its cells, or the strongest."""
    from rich.text import Text

    limits = limits_of(view.values, view.scale, view.limit)
    decimals, signed = decimals_for([limits.high]), view.scale == "diverging"
    if len(view.cols) > _GRID_COLS or len(view.rows) > _GRID_ROWS:
        return _strongest_cells(view, limits)
    out = plain_table()
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
            cells.append(Text(text, style=paint(value, limits)))
        out.add_row(Text(visible(name)), *cells)
    return under(out, view.unit)


def _corner(view: Grid) -> str:
    names = (visible_line(view.row_name), visible_line(view.col_name))
    return "/".join(name for name in names if name)


def _strongest_cells(view: Grid, limits: Limits) -> "RenderableType":
    """The cells of largest magnitude of a grid that is too wide for a terminal."""
    from rich.text import Text

    data = np.array(view.values, dtype=float).reshape(len(view.rows), len(view.cols))
    order = np.argsort(-np.abs(np.nan_to_num(data)), axis=None)[:_STRONGEST]
    out = plain_table()
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
        out.add_row(*place, Text(number, style=paint(value, limits)), *extra)
    return under(out, f"the {out.row_count} strongest of {data.size} cells")


def bars(view: Bars) -> "RenderableType":
    """Bars of blocks."""
    from rich.text import Text

    low, high = view.span or bar_span(view)
    decimals = decimals_for([*view.values, view.total])
    out = plain_table(header=False)
    out.add_column(justify="right")
    out.add_column(justify="right")
    out.add_column()
    for i, (label, value) in enumerate(zip(view.labels[:_MOST], view.values, strict=False)):
        number = show(value, decimals, signed=view.signed)
        row = [Text(visible(label)), Text(number), _bar(value, low, high, view.signed)]
        if view.baseline is not None:
            ends = [show(x, decimals, signed=view.signed) for x in view.baseline[i]]
            row[2].append(f"  {visible_line(view.baseline_name)} {ends[0]} to {ends[1]}", "dim")
        out.add_row(*row)
    if view.total is not None:
        number = Text(show(view.total, decimals, signed=view.signed), style="bold")
        out.add_row(Text("total"), number, Text(visible_line(view.total_label), style="dim"))
    return under(under(out, view.unit), _rest(len(view.labels), _MOST))


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


def heads(view: Heads) -> "RenderableType":
    """The strongest links of each head."""
    from rich.text import Text

    out = Text()
    n = len(view.tokens)
    for i, head in enumerate(view.heads[:_MOST]):
        out.append("\n" if i else "").append(visible_line(head.label), style="bold")
        out.append(f"  {visible_line(head.note)}", style="dim")
        for q, k, weight in strongest(np.array(head.pattern, dtype=float).reshape(n, n)):
            names = f"{visible(view.tokens[q])} ({q}) looks at {visible(view.tokens[k])} ({k})"
            out.append(f"\n  {names}: {weight}")
    return under(out, _rest(len(view.heads), _MOST))


def lines(view: Lines) -> "RenderableType":
    """A small curve and its ends, per series."""
    from rich.text import Text

    out = plain_table()
    for name in (view.y_name or "series", "", "first", "last", "lowest", "highest"):
        out.add_column(Text(visible_line(name)), justify="left" if not name else "right")
    for line in view.series:
        known = [v for v in line.values if v is not None]
        digits = decimals_for(known)
        ends = [known[0], known[-1], min(known), max(known)] if known else [None] * 4
        numbers = [Text(show(v, digits, signed=False)) for v in ends]
        out.add_row(Text(visible_line(line.name)), Text(spark(line.values)), *numbers)
    span = f"{view.x_name} {view.x[0]} to {view.x[-1]}" if view.x else ""
    return under(out, span)


def spark(values: list[float | None], width: int = 40) -> str:
    """The curve in eight heights; a dot where there is no value."""
    step = -(-len(values) // width) if values else 1
    thin = values[::step]
    known = [v for v in thin if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join("·" if v is None else _SPARK[round((v - low) * scale)] for v in thin)


def table(view: Table) -> "RenderableType":
    """A table."""
    from rich.text import Text

    out = plain_table()
    for i, column in enumerate(view.columns):
        cells = [row[i] for row in view.rows]
        right = any(isinstance(cell, int | float) for cell in cells)
        name = f"{column.name} {column.unit}".rstrip()
        out.add_column(Text(visible_line(name)), justify="right" if right else "left")
    digits = [column_decimals(view, i) for i in range(len(view.columns))]
    for row in view.rows[:_TABLE_ROWS]:
        cells = [cell_text(c, view.columns[i], digits[i]) for i, c in enumerate(row)]
        out.add_row(*[Text(visible(cell)) for cell in cells])
    return under(out, _rest(len(view.rows), _TABLE_ROWS))


def texts(view: Texts) -> "RenderableType":
    """Texts, coloured by probability."""
    from rich.text import Text

    limits = limits_of([], "probability")
    out = Text()
    for i, column in enumerate(view.columns):
        out.append("\n" if i else "").append(visible_line(column.label), style="bold")
        out.append(f"  {visible_line(column.note)}\n  ", style="dim")
        values = column.values or [None] * len(column.tokens)
        for token, value in zip(column.tokens, values, strict=True):
            style = paint(value, limits) if value is not None else ""
            out.append(visible(token).replace("·", " "), style=style)
        known = [v for v in values if v is not None]
        if known:
            mean = show(sum(known) / len(known), 3, signed=False)
            out.append(f"\n  mean probability {mean}", style="dim")
    return out
