"""Matrices: heat maps and attention patterns.

A small grid is a real `<table>` with the number printed in each cell. A large one is a picture, one
pixel per cell, enlarged by the browser, with labels in HTML around it and a hidden table behind it.
Missing cells are transparent; the hatching is the background that shows through.
"""

from collections.abc import Sequence

import numpy as np

from underhood.view import png
from underhood.view.colour import Limits, cell_colour, indices, ink, limits_of
from underhood.view.doc import Grid, Head, Heads
from underhood.view.legend import legend
from underhood.view.markup import Html, join, tag, token_html, visible
from underhood.view.number import decimals_for, show

_TABLE_CELLS = 600
_TABLE_COLS = 40
_ROOMY_COLS = 20  # beyond this many, cells are drawn narrower
_LABELS = 26  # at most so many labels along one side of a picture
_DRAWN_HEADS = 64  # pictures; thousands of them make a page that opens slowly and is not read
_HEAD_LABELS = 24  # longer patterns are drawn without a label per token


def is_table(view: Grid) -> bool:
    """True where the grid is drawn as a table with legible cells."""
    rows, cols = len(view.rows), len(view.cols)
    return rows * cols <= _TABLE_CELLS and cols <= _TABLE_COLS


def grid(view: Grid) -> Html:
    """A heat map with its legend."""
    limits = limits_of(view.values, view.scale, view.limit)
    body = _table(view, limits) if is_table(view) else _picture(view, limits)
    missing = any(v is None for row in view.values for v in row)
    marked = f"outlined: {_marks_text(view)}" if view.marks else ""
    return join([body, legend(limits, view.unit, missing=missing, marked=marked)])


def _marks_text(view: Grid) -> str:
    names = [_place(view, r, c) for r, c in view.marks]
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _place(view: Grid, r: int, c: int) -> str:
    """One cell in words: `layer 3, token ·Mary`."""
    row = f"{view.row_name} {visible(view.rows[r])}".lstrip()
    return f"{row}, " + f"{view.col_name} {visible(view.cols[c])}".lstrip()


def _table(view: Grid, limits: Limits) -> Html:
    # The scale sets the digits: a control beside its claim then has no more of them than the claim.
    decimals = decimals_for([limits.high])
    # Long labels over narrow cells stand upright; words in the cells make them wide enough.
    longest = max((len(c) for c in view.cols), default=0)
    upright = len(view.cols) > 4 and longest > 6 and not view.cell_text
    corner = tag("td", _axes(view), cls="uh-corner")
    head = [tag("th", tag("span", token_html(c)), scope="col", title=visible(c)) for c in view.cols]
    marks = set(view.marks)
    body = []
    for r, label in enumerate(view.rows):
        cells = [
            _cell(view, r, c, limits, decimals, (r, c) in marks) for c in range(len(view.cols))
        ]
        body.append(tag("tr", tag("th", token_html(label), scope="row"), *cells))
    kinds = ["uh-cells", *["uh-upright"] * upright, *["uh-worded"] * bool(view.cell_text)]
    kinds += ["uh-dense"] * (len(view.cols) > _ROOMY_COLS)
    table = tag(
        "table", tag("thead", tag("tr", corner, *head)), tag("tbody", *body), cls=" ".join(kinds)
    )
    name = view.title or "grid"
    return tag("div", table, cls="uh-scroll", tabindex=0, role="region", aria_label=name)


def _axes(view: Grid) -> Html:
    down = tag("span", f"{view.row_name} ↓") if view.row_name else Html("")
    across = tag("span", f"{view.col_name} →") if view.col_name else Html("")
    return tag("span", across, down, cls="uh-axes")


def _cell(view: Grid, r: int, c: int, limits: Limits, decimals: int, marked: bool) -> Html:
    value = view.values[r][c]
    text = show(value, decimals, signed=view.scale == "diverging")
    words = visible(view.cell_text[r][c]) if view.cell_text else ""
    where = _place(view, r, c)
    shown = "no value" if value is None else f"{text} {view.unit}".rstrip()
    title = f"{where}: {shown}" + (f" ({words})" if words else "")
    kinds = ["uh-none"] * (value is None) + ["uh-marked"] * marked
    style = None
    if value is not None:
        back = cell_colour(value, limits)
        style = f"background:{back};color:{ink(back)}"
    inner = (
        join([tag("b", token_html(view.cell_text[r][c])), tag("small", text)])
        if view.cell_text
        else Html(text)
    )
    return tag("td", inner, cls=" ".join(kinds) or None, style=style, title=title)


def _picture(view: Grid, limits: Limits) -> Html:
    data = np.array(view.values, dtype=float)
    rows, cols = data.shape if data.ndim == 2 else (0, 0)
    if not rows or not cols:
        return tag("p", "This grid has no cells.", cls="uh-note")
    height = min(max(rows * 12, 150), 560)
    image = _image(data, limits, _summary(view, data))
    marks = [
        tag(
            "span",
            cls="uh-spot",
            style=f"left:{_pct(c, cols)};top:{_pct(r, rows)};"
            f"width:{_pct(1, cols)};height:{_pct(1, rows)}",
            title=_place(view, r, c),
        )
        for r, c in view.marks
    ]
    plate = tag("div", image, *marks, cls="uh-plate uh-none", style=f"height:{height}px")
    down = _side(view.rows, min(_LABELS, max(2, height // 16)), "top")
    across = _side(view.cols, _LABELS, "left")
    wide = max(len(visible(label)) for label in view.rows)
    return tag(
        "div",
        tag("span", f"{view.row_name} ↓" if view.row_name else "", cls="uh-rowname"),
        tag("div", *down, cls="uh-down"),
        plate,
        tag("div", *across, cls="uh-across"),
        tag("span", f"{view.col_name} →" if view.col_name else "", cls="uh-colname"),
        cls="uh-picture",
        aria_hidden="true",
        style=f"--side:{min(wide, 16) + 1}ch",
    )


def _summary(view: Grid, data: np.ndarray) -> str:
    finite = data[np.isfinite(data)]
    size = f"{data.shape[0]} by {data.shape[1]} cells"
    if not finite.size:
        return f"heat map, {size}, no values"
    low, high = float(finite.min()), float(finite.max())
    decimals = decimals_for([low, high])
    ends = f"from {show(low, decimals)} to {show(high, decimals)} {view.unit}".rstrip()
    return f"heat map, {size}, {ends}"


def _image(data: np.ndarray, limits: Limits, alt: str) -> Html:
    source = png.data_uri(indices(data, limits), limits.scale)
    return tag("img", src=source, alt=alt, width=data.shape[1], height=data.shape[0], cls="uh-img")


def _side(labels: Sequence[str], most: int, edge: str) -> list[Html]:
    """Labels along one side, thinned evenly, each at the middle of its row or column."""
    step = -(-len(labels) // most)
    chosen = range(0, len(labels), step)
    return [
        tag(
            "span",
            token_html(labels[i]),
            style=f"{edge}:{_pct(i + 0.5, len(labels))}",
            cls="uh-odd" if k % 2 else None,
        )
        for k, i in enumerate(chosen)
    ]


def _pct(part: float | int, whole: int) -> str:
    return f"{100 * part / whole:.3f}%"


def heads(view: Heads) -> Html:
    """One picture per head with its three strongest links in words, and one legend for all."""
    limits = limits_of([], "probability")
    shown = view.heads[:_DRAWN_HEADS]
    figures = [_head(head, view.tokens, limits) for head in shown]
    more = f"{len(shown)} of {len(view.heads):,} heads; the saved file has them all"
    notes = [tag("span", more)] * (len(shown) < len(view.heads)) + [
        tag("span", "down: the token that looks (query); across: the one looked at (key)"),
        tag("span", "strongest links leave out the first token, where attention rests"),
    ]
    return join(
        [
            tag("div", *figures, cls="uh-gallery"),
            legend(limits, "attention probability", extra=notes),
        ]
    )


def _head(head: Head, tokens: Sequence[str], limits: Limits) -> Html:
    data = np.array(head.pattern, dtype=float).reshape(len(tokens), len(tokens))
    n = len(tokens)
    alt = f"attention pattern of {head.label}: {n} queries by {n} keys"
    plate = tag("div", _image(data, limits, alt), cls="uh-plate uh-blank")
    if n <= _HEAD_LABELS:
        down = [tag("span", token_html(t)) for t in tokens]
        across = [tag("span", token_html(t)) for t in tokens]
        body = tag(
            "div",
            tag("div", *down, cls="uh-hdown", aria_hidden="true"),
            plate,
            tag("div", *across, cls="uh-hacross", aria_hidden="true"),
            cls="uh-pattern",
            style=f"--n:{n}",
        )
    else:
        body = tag("div", plate, cls="uh-pattern uh-bare")
    links = [
        tag("li", token_html(tokens[q]), f" ({q}) looks at ", token_html(tokens[k]), f" ({k}): {w}")
        for q, k, w in strongest(data)
    ]
    note = tag("span", f" {head.note}", cls="uh-note") if head.note else Html("")
    caption = tag("figcaption", tag("span", head.label, cls="uh-label"), note)
    return tag("figure", caption, body, tag("ul", *links) if links else Html(""), cls="uh-head")


def strongest(data: np.ndarray, most: int = 3) -> list[tuple[int, int, str]]:
    """The largest weights (query, key, text), first key left out: it is where attention rests."""
    rest = np.nan_to_num(data, nan=0.0)
    rest[:, :1] = 0
    order = np.argsort(-rest, axis=None, kind="stable")[:most]
    found = [divmod(int(i), data.shape[1]) for i in order]
    return [(q, k, show(rest[q, k], 2, signed=False)) for q, k in found if rest[q, k] > 0]
