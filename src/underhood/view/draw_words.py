"""The kinds made of words: sentences, token strips, texts side by side, tables."""

from collections.abc import Sequence

from underhood.view.colour import Limits, cell_colour, ink, limits_of
from underhood.view.doc import Cell, Column, Number, Sentences, Table, Text, Texts, Tokens
from underhood.view.legend import legend
from underhood.view.markup import Html, join, prose_html, tag, token_html, visible
from underhood.view.number import MINUS, NONE, decimals_for, show

_NUMBERED_TOKENS = 160  # beyond this many, the small numbers below the tokens only make noise


def sentences(view: Sentences) -> Html:
    """One paragraph per statement."""
    return tag("div", *[tag("p", item) for item in view.items], cls="uh-says")


def tokens(view: Tokens) -> Html:
    """A strip of chips: the token, its value below it, its position in the tooltip."""
    if view.values is None:
        chips = [
            tag("span", tag("span", token_html(token)), cls="uh-chip", title=f"position {i}")
            for i, token in enumerate(view.tokens)
        ]
        return tag("div", *chips, cls="uh-strip")
    limits = limits_of(view.values, view.scale, view.limit)
    missing = any(value is None for value in view.values)
    strip = chips_of(view.tokens, view.values, limits, view.unit)
    return join([strip, legend(limits, view.unit, missing=missing)])


def chips_of(
    tokens: Sequence[str], values: Sequence[Number], limits: Limits, unit: str = ""
) -> Html:
    """Tokens coloured by value, without a legend."""
    signed = limits.scale == "diverging"
    decimals = decimals_for([limits.high])
    numbered = len(tokens) <= _NUMBERED_TOKENS
    chips = []
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        text = show(value, decimals, signed=signed)
        style = None
        if value is not None:
            back = cell_colour(value, limits)
            style = f"background:{back};color:{ink(back)}"
        what = f"position {i}, {visible(token)}: {text} {unit}".rstrip()
        below = tag("small", text) if numbered else Html("")
        chip = "uh-chip" if value is not None else "uh-chip uh-none"
        name = tag("span", token_html(token))
        chips.append(tag("span", name, below, cls=chip, style=style, title=what))
    return tag("div", *chips, cls="uh-strip", aria_hidden="true")


def texts(view: Texts) -> Html:
    """Columns of running text; the line under a token is thicker and lighter as it is likelier."""
    columns = [_text(column) for column in view.columns]
    body = tag("div", *columns, cls="uh-columns")
    if not any(column.values for column in view.columns):
        return body
    limits = limits_of([], "probability")
    note = "line under a token: its probability; thicker is likelier"
    return join([body, legend(limits, "probability", extra=[tag("span", note)])])


def _text(column: Text) -> Html:
    limits = limits_of([], "probability")
    values = column.values or [None] * len(column.tokens)
    words = []
    for token, value in zip(column.tokens, values, strict=True):
        if value is None:
            words.append(tag("span", prose_html(token)))
            continue
        share = min(max(value, 0.0), 1.0)
        colour = cell_colour(share, limits)
        thick = 1.5 + 4.5 * share
        line = f"background:linear-gradient({colour},{colour}) 0 100%/100% {thick:.1f}px no-repeat"
        title = f"{visible(token)}: probability {show(value, 3, signed=False)}"
        words.append(tag("span", prose_html(token), style=line, title=title, cls="uh-word"))
    known = [v for v in values if v is not None]
    told = ""
    if known:
        mean = show(sum(known) / len(known), 3, signed=False)
        told = f"mean probability {mean}, lowest {show(min(known), 3, signed=False)}"
    # Always four rows, so that neighbouring columns can share them and stay aligned.
    return tag(
        "div",
        tag("p", column.label, cls="uh-label"),
        tag("p", column.note, cls="uh-note"),
        tag("p", *words, cls="uh-prose"),
        tag("p", told, cls="uh-note"),
        cls="uh-column",
    )


def table(view: Table) -> Html:
    """A real table; numbers right-aligned in one format per column."""
    numeric = [_is_numeric(view, c) for c in range(len(view.columns))]
    head = []
    for column, right in zip(view.columns, numeric, strict=True):
        unit = tag("span", f" {column.unit}", cls="uh-unit") if column.unit else Html("")
        head.append(tag("th", column.name, unit, scope="col", cls="uh-num" if right else None))
    digits = [column_decimals(view, c) for c in range(len(view.columns))]
    body = []
    for row in view.rows:
        cells = []
        for i, (cell, column) in enumerate(zip(row, view.columns, strict=True)):
            text = cell_text(cell, column, digits[i])
            kind = "uh-num" if numeric[i] else None
            cells.append(tag("th" if i == 0 and not numeric[0] else "td", text, cls=kind))
        body.append(tag("tr", *cells))
    inner = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), cls="uh-rows")
    label = view.title or "table"
    return tag("div", inner, cls="uh-scroll", tabindex=0, role="region", aria_label=label)


def cell_text(cell: Cell, column: Column, decimals: int) -> str:
    """One table cell as it is printed; a format that does not fit the value is not applied."""
    if cell is None:
        return NONE
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if column.format:
        try:
            return format(cell, column.format).replace("-", MINUS)
        except ValueError:  # e.g. `d` for a float
            return show(cell, decimals, signed="+" in column.format)
    if isinstance(cell, int):
        return str(cell).replace("-", MINUS)
    return show(cell, decimals, signed=False)


def _is_numeric(view: Table, column: int) -> bool:
    cells = [row[column] for row in view.rows if row[column] is not None]
    return bool(cells) and all(isinstance(c, int | float) for c in cells)


def column_decimals(view: Table, column: int) -> int:
    """Decimals for the floats of one column without a format of its own."""
    cells = [row[column] for row in view.rows]
    return decimals_for(c for c in cells if isinstance(c, float) and not isinstance(c, bool))
