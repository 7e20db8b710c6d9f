"""View -> HTML, static: what is here reads with JavaScript off.

This module draws what all kinds share (title, how to read it, the control beside the claim, where
the numbers come from) and hands the picture itself to `draw_*`, one function per kind. Everything
goes through `markup.tag`, which escapes.
"""

from functools import cache
from importlib import resources
from typing import Any

from underhood.view import draw_grid, upgrade
from underhood.view.doc import Grid, Group, View
from underhood.view.draw import DRAW, READABLE
from underhood.view.flat import Cell, flatten
from underhood.view.markup import Html, esc, join, tag, token_html
from underhood.view.number import plain
from underhood.view.rescale import rescaled, share_scale

_HIDDEN_CELLS = 2000  # a screen reader gains nothing from a longer table, and the page grows


@cache
def style() -> str:
    """The style sheet, minified a little; everything in it is scoped to `.uh`."""
    text = resources.files("underhood.view").joinpath("style.css").read_text("utf-8")
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def fragment(view: View, *, level: int = 3, live: bool = False) -> str:
    """A view alone, with its style sheet: for a notebook cell or a page of one's own.

    Args:
        view: what to draw.
        level: the heading level of its title, 1 to 6.
        live: add the script (some 100 kB), so that the view can be pointed at where scripts run.
            Every cell brings its own copy, as cells are cleared and reordered; the first defines
            the elements and the others only use them.
    """
    sheet = tag("style", Html(style()))
    inner = render(view, level=level, live=live)
    script = upgrade.script_tag() if live else Html("")
    return tag("div", sheet, inner, script, cls="uh uh-alone")


def render(
    view: View, *, level: int = 3, skip: dict[str, Any] | None = None, live: bool = False
) -> Html:
    """A view as HTML without the style sheet.

    Args:
        view: what to draw.
        level: the heading level of its title, 1 to 6; inner views are one below.
        skip: provenance that the page states once for all, and that is not repeated here.
        live: put the document beside the drawing, for the script of `upgrade`.
    """
    carried = upgrade.document(view, level) if live else Html("")
    if isinstance(view, Group):
        return _group(view, level, skip, carried)
    shown, control = view, view.control
    if control is not None:
        shown, control = share_scale(view, control)
    body = join([DRAW[view.kind](rescaled(shown)), _hidden_table(view)])
    caption = _caption(view, level)
    if control is not None:
        wide = isinstance(view, Grid) and len(view.cols) > 8
        pair = "uh-pair uh-stacked" if wide or view.kind in {"tokens", "table"} else "uh-pair"
        body = tag(
            "div", tag("div", body, cls="uh-claim"), _control(control, level, skip), cls=pair
        )
    return tag(
        "section",
        caption,
        body,
        _made(view, skip),
        carried,
        cls=f"uh-view uh-{view.kind}",
        aria_label=view.title or view.kind,
    )


def _control(control: View, level: int, skip: dict[str, Any] | None) -> Html:
    badge = tag("p", "control", cls="uh-badge")
    return tag("div", badge, render(control, level=level + 1, skip=skip), cls="uh-control")


def _caption(view: View, level: int) -> Html:
    parts = []
    if view.title:
        parts.append(tag(f"h{min(level, 6)}", view.title, cls="uh-title"))
    if view.about:
        parts.append(tag("p", view.about, cls="uh-about"))
    return join(parts)


def _group(view: Group, level: int, skip: dict[str, Any] | None, carried: Html) -> Html:
    inner = [render(part, level=level + 1, skip=skip) for part in view.views]
    if view.control is not None:
        inner.append(_control(view.control, level, skip))
    about = tag("p", view.about, cls="uh-about") if view.about else Html("")
    made = _made(view, skip)
    label = view.title or "details"
    if not view.folded:
        return tag(
            "section",
            _caption(view, level),
            *inner,
            made,
            carried,
            cls="uh-view uh-group",
            aria_label=label,
        )
    count = f"{len(view.views)} view{'s' if len(view.views) != 1 else ''}"
    summary = tag(
        "summary",
        tag(f"h{min(level, 6)}", label, cls="uh-title"),
        tag("span", count, cls="uh-count"),
    )
    parts = [summary, about, *inner, made, carried]
    return tag("details", *parts, cls="uh-view uh-group uh-folded")


def _hidden_table(view: View) -> Html:
    """The numbers behind a picture for those who cannot see it; nothing where they are text."""
    if view.kind in READABLE:
        return Html("")
    if isinstance(view, Grid) and draw_grid.is_table(view):
        return Html("")
    tables = list(flatten(view.model_copy(update={"control": None})))
    cells = sum(flat.cells for flat in tables)
    if cells > _HIDDEN_CELLS:
        told = f"{view.title or view.kind}: the numbers are too many for a table here"
        return tag("p", f"{told} ({cells} cells); save as CSV.", cls="uh-hidden")
    parts = []
    for flat in tables:
        caption = f"{flat.title or view.kind}: the numbers"
        head = tag("tr", *[tag("th", token_html(name), scope="col") for name in flat.header])
        rows = [tag("tr", *[tag("td", _cell(c)) for c in row]) for row in flat.rows]
        table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows))
        parts.append(tag("div", table, cls="uh-hidden"))
    return join(parts)


def _cell(cell: Cell) -> str:
    if isinstance(cell, float):
        return plain(cell)
    return "" if cell is None else str(cell)


def _made(view: View, skip: dict[str, Any] | None) -> Html:
    """How this view was made: provenance not already told, and the Python call."""
    told = skip or {}
    fresh = {k: v for k, v in (view.provenance or {}).items() if told.get(k) != v}
    if not fresh and not view.python:
        return Html("")
    parts = [tag("summary", "How this was made")]
    if view.python:
        parts.append(code(view.python))
    if fresh:
        parts.append(facts(fresh))
    return tag("details", *parts, cls="uh-made")


def code(text: str) -> Html:
    """A block of Python to copy; scrolls sideways, also by keyboard."""
    inner = tag("code", text)
    return tag("pre", inner, cls="uh-code", tabindex=0, role="region", aria_label="Python call")


def facts(provenance: dict[str, Any]) -> Html:
    """Provenance as a definition list."""
    items = []
    for key, value in provenance.items():
        shown = value if isinstance(value, str) else plain_value(value)
        long = "uh-long" if len(shown) > 60 else None
        pair = (tag("dt", key.replace("_", " ")), tag("dd", esc(shown)))
        items.append(tag("div", *pair, cls=long))
    return tag("dl", *items, cls="uh-facts")


def plain_value(value: Any) -> str:
    """A JSON value on one line, in words where there are words."""
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain_value(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(plain_value(item) for item in value)
    return str(value)
