"""Charts: signed bars in a real table, and curves as an SVG with its labels in HTML.

The curve's SVG is stretched to the width of the page while strokes keep their width, and every
label is HTML, so text has the same size on a telephone and on a wall.
"""

import math
from collections.abc import Iterable, Sequence

from underhood.view.doc import Bars, Lines, Series, Timeline
from underhood.view.legend import none_swatch, swatch_row
from underhood.view.markup import Html, join, tag, token_html, visible
from underhood.view.number import decimals_for, show
from underhood.view.rescale import bar_span, line_span

_SHOWN_BARS = 40
_INKS = 6  # series colours before dashes repeat with another marker
_DASHES = ("", "7 4", "2 4", "10 4 2 4", "4 3", "1 3")


def bars(view: Bars) -> Html:
    """A table of label, bar and value; long lists fold their tail."""
    low, high = view.span or bar_span(view)
    decimals = decimals_for([*view.values, view.total])
    rows = [_bar(view, i, low, high, decimals) for i in range(len(view.labels))]
    head = tag(
        "thead",
        tag(
            "tr", *[tag("th", name, scope="col") for name in ("part", view.unit or "value", "bar")]
        ),
        cls="uh-hidden",
    )
    foot = _total(view, decimals)
    parts = [tag("table", head, tag("tbody", *rows[:_SHOWN_BARS]), foot, cls="uh-bars")]
    if len(rows) > _SHOWN_BARS:
        more = tag("table", tag("tbody", *rows[_SHOWN_BARS:]), cls="uh-bars")
        told = tag("summary", f"the other {len(rows) - _SHOWN_BARS}")
        parts.append(tag("details", told, more, cls="uh-more"))
    parts.append(_bars_legend(view, low, high))
    return join(parts)


def _total(view: Bars, decimals: int) -> Html:
    if view.total is None:
        return Html("")
    number = show(view.total, decimals, signed=view.signed)
    cells = [
        tag("th", "total", scope="row"),
        tag("td", number, cls="uh-num"),
        tag("td", view.total_label, cls="uh-told"),
    ]
    return tag("tfoot", tag("tr", *cells))


def _bar(view: Bars, i: int, low: float, high: float, decimals: int) -> Html:
    label, value = view.labels[i], view.values[i]
    zero = _share(0.0, low, high)
    inside = [tag("span", cls="uh-axis", style=f"left:{zero:.2f}%")]
    text = show(value, decimals, signed=view.signed)
    title = f"{visible(label)}: {text} {view.unit}".rstrip()
    if view.baseline is not None:
        start, end = view.baseline[i]
        if start is not None and end is not None:
            a, b = sorted((_share(start, low, high), _share(end, low, high)))
            style = f"left:{a:.2f}%;width:max({b - a:.2f}%,2px)"
            inside.append(tag("span", cls="uh-band", style=style))
            ends = [show(x, decimals, signed=view.signed) for x in (start, end)]
            title += f"; {view.baseline_name} {' to '.join(dict.fromkeys(ends))}"
    if value is not None:
        at = _share(value, low, high)
        style = f"left:{min(at, zero):.2f}%;width:{abs(at - zero):.2f}%"
        kind = "uh-neg" if value < 0 else ("uh-pos" if view.signed else "uh-amount")
        inside.append(tag("span", cls=f"uh-bar {kind}", style=style))
    track = tag("div", *inside, cls="uh-track")
    return tag(
        "tr",
        tag("th", token_html(label), scope="row", cls="uh-longlabel" if len(label) > 22 else None),
        tag("td", text, cls="uh-num"),
        tag("td", track, cls="uh-trackcell", aria_hidden="true"),
        title=title,
    )


def _bars_legend(view: Bars, low: float, high: float) -> Html:
    decimals = decimals_for([low, high])
    ends = [show(x, decimals, signed=view.signed) for x in (low, high)]
    parts = [tag("span", f"axis {ends[0]} to {ends[1]} {view.unit}".rstrip())]
    if view.baseline is not None:
        parts.append(tag("span", tag("span", cls="uh-swatch uh-band"), view.baseline_name))
    if any(v is None for v in view.values):
        parts.append(none_swatch("no value (–)"))
    return swatch_row(*parts)


def _share(value: float, low: float, high: float) -> float:
    return 100 * min(max((value - low) / (high - low), 0.0), 1.0)


def lines(view: Lines) -> Html:
    """Curves with bands and ticks; a legend tells lines apart by dash as well as by colour."""
    n = len(view.x)
    xs = [_x(i, n) for i in range(n)]
    return join([plot(view, xs, label_ticks(view.x, xs)), series_legend(view.series)])


def plot(
    view: Lines | Timeline,
    xs: Sequence[float],
    ticks_below: Sequence[Html],
    marks: Sequence[tuple[float, str]] = (),
) -> Html:
    """The curves of a view over places of its points.

    Args:
        view: what to draw.
        xs: where each point stands, in percent of the width.
        ticks_below: labels of the x axis.
        marks: vertical lines, each with its place and label.
    """
    ticks = nice_ticks(*(view.span or line_span(view)))
    low, high = ticks[0], ticks[-1]
    if view.span is None:
        data_low, data_high = line_span(view)
        low, high = min(low, data_low), max(high, data_high)
    decimals = max(decimals_for(ticks), _step_decimals(ticks))
    numbers = [show(t, decimals, signed=False) for t in ticks]
    shapes = [
        tag("path", d=f"M0 {_y(t, low, high):.2f}H100", cls="uh-zeroline" if t == 0 else "uh-rule")
        for t in ticks
    ]
    shapes += [tag("path", d=f"M{at:.2f} 0V100", cls="uh-markline") for at, _ in marks]
    for i, line in enumerate(view.series):
        shapes += _curve(line, i, low, high, xs)
    svg = tag("svg", *shapes, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")
    ylabels = [
        tag("span", n, style=f"top:{_y(t, low, high):.2f}%")
        for t, n in zip(ticks, numbers, strict=True)
    ]
    told = [tag("span", label, cls="uh-onset", style=_beside(at)) for at, label in marks]
    return tag(
        "div",
        tag("p", view.y_name, cls="uh-yname"),
        tag("div", *ylabels, cls="uh-yticks"),
        tag("div", svg, *told, cls="uh-area", role="img", aria_label=_told(view)),
        tag("div", *ticks_below, cls="uh-xticks", aria_hidden="true"),
        tag("p", view.x_name, cls="uh-xname"),
        cls="uh-plot",
        style=f"--side:{max(map(len, numbers)) + 1}ch",
    )


def _beside(at: float) -> str:
    """A label right of its line, or left of it where there is no room."""
    return f"left:{at:.2f}%" if at < 70 else f"right:{100 - at:.2f}%"


def _told(view: Lines | Timeline) -> str:
    names = ", ".join(line.name for line in view.series)
    return f"{view.title or 'curves'}: {view.y_name} over {view.x_name} for {names}"


def _curve(line: Series, index: int, low: float, high: float, xs: Sequence[float]) -> list[Html]:
    """Band, line and points of one series; missing values break the line."""
    ink = f"uh-ink{index % _INKS}"
    shapes = []
    if line.low is not None and line.high is not None:
        both = [None if b is None else a for a, b in zip(line.low, line.high, strict=True)]
        for run in _runs(both):
            upper = [f"{xs[i]:.2f} {_y(line.high[i] or 0.0, low, high):.2f}" for i in run]
            lower = [f"{xs[i]:.2f} {_y(line.low[i] or 0.0, low, high):.2f}" for i in reversed(run)]
            shapes.append(tag("path", d=f"M{'L'.join(upper + lower)}Z", cls=f"uh-shade {ink}"))
    for run in _runs(line.values):
        points = [f"{xs[i]:.2f} {_y(line.values[i] or 0.0, low, high):.2f}" for i in run]
        shapes.append(
            tag(
                "path",
                d=f"M{'L'.join(points)}",
                cls=f"uh-line {ink}",
                stroke_dasharray=_DASHES[index % len(_DASHES)] or None,
            )
        )
        if len(xs) <= 60:
            # A stroke of length zero with round ends is a dot that stretching cannot deform.
            dots = "".join(f"M{p}h0" for p in points)
            shapes.append(tag("path", d=dots, cls=f"uh-dot {ink}"))
    return shapes


def _runs(values: Sequence[float | None]) -> list[list[int]]:
    """Stretches of consecutive indices that have a value."""
    found: list[list[int]] = []
    for i, value in enumerate(values):
        if value is None:
            continue
        if found and found[-1][-1] == i - 1:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _x(i: int, n: int) -> float:
    return 2 + 96 * (i / (n - 1) if n > 1 else 0.5)


def _y(value: float, low: float, high: float) -> float:
    return 100 - _share(value, low, high)


def label_ticks(labels: Sequence[str], xs: Sequence[float]) -> list[Html]:
    """Labels below their points, thinned so that they do not touch."""
    n = len(labels)
    longest = max((len(visible(label)) for label in labels), default=1)
    most = min(max(80 // (longest + 2), 2), 25)
    step = -(-n // most) if n else 1
    crowded = (n // step) * (longest + 2) > 44  # characters that a telephone has room for
    return [
        tag(
            "span",
            token_html(labels[i]),
            style=f"left:{xs[i]:.2f}%",
            cls="uh-odd" if crowded and k % 2 else None,
        )
        for k, i in enumerate(range(0, n, step))
    ]


def series_legend(series: Sequence[Series]) -> Html:
    """Dash, colour and last value of each line."""
    parts = []
    for i, line in enumerate(series):
        dash = _DASHES[i % len(_DASHES)] or None
        stroke = tag("path", d="M1 6H27", cls=f"uh-line uh-ink{i % _INKS}", stroke_dasharray=dash)
        sample = tag("svg", stroke, viewBox="0 0 28 12", cls="uh-sample", aria_hidden="true")
        known = [v for v in line.values if v is not None]
        last = f" (last {show(known[-1], decimals_for(known), signed=False)})" if known else ""
        band = ", band: its interval" if line.low is not None else ""
        parts.append(tag("span", sample, f"{line.name}{last}{band}"))
    return swatch_row(*parts)


def nice_ticks(low: float | int, high: float | int, most: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most about `most` of them."""
    rough = (high - low) / max(most - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(float(i * step), 12) for i in range(first, last + 1)]


def _step_decimals(ticks: Iterable[float]) -> int:
    """Decimals needed so that neighbouring ticks do not print alike."""
    return max((len(f"{t:.6f}".rstrip("0").partition(".")[2]) for t in ticks), default=0)
