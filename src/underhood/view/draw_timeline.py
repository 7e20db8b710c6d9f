"""Series over steps: a generation with its tokens, or training with its onset."""

import math
from collections.abc import Callable, Sequence

from underhood.view.doc import Timeline
from underhood.view.draw_chart import label_ticks, nice_ticks, plot, series_legend
from underhood.view.markup import Html, join, tag, token_html
from underhood.view.number import power_text

_SHOWN_TOKENS = 600
_MARGIN = 2.0  # percent kept free at both ends, so that the first and last points are whole


def timeline(view: Timeline) -> Html:
    """The curves, the marks, and the tokens of the steps."""
    if not view.steps:
        return tag("p", "This timeline has no steps.", cls="uh-note")
    place = axis(view.steps, log=view.log)
    xs = [place(step) for step in view.steps]
    below = label_ticks(view.tokens, xs) if view.tokens else _step_ticks(view.steps, place, view)
    inside = [m for m in view.marks if view.steps[0] <= m.step <= view.steps[-1]]
    marks = [(place(m.step), f"{m.label} ({m.step:g})") for m in inside]
    parts = [plot(view, xs, below, marks), series_legend(view.series)]
    if view.tokens:
        parts.append(_strip(view.tokens))
    if view.log:
        note = "logarithmic axis" + ("; step 0 stands at its left end" * (view.steps[0] == 0))
        parts.append(tag("p", note, cls="uh-note"))
    return join(parts)


def axis(steps: Sequence[float], *, log: bool) -> Callable[[float], float]:
    """Where a step stands, in percent of the width.

    On a logarithmic axis step 0 stands where half the first positive step would.
    """
    first = next((s for s in steps if s > 0), 1.0)

    def scaled(step: float) -> float:
        return math.log10(max(step, first / 2)) if log else float(step)

    low, high = scaled(steps[0]), scaled(steps[-1])
    width = 100 - 2 * _MARGIN
    if high <= low:
        return lambda step: 50.0
    return lambda step: _MARGIN + width * (scaled(step) - low) / (high - low)


def _step_ticks(
    steps: Sequence[float], place: Callable[[float], float], view: Timeline
) -> list[Html]:
    return [
        tag("span", text, style=f"left:{place(step):.2f}%")
        for step, text in axis_ticks(steps[0], steps[-1], log=view.log)
    ]


def axis_ticks(low: float, high: float, *, log: bool) -> list[tuple[float, str]]:
    """Round steps between two ends, with their labels."""
    if not log:
        if high <= low:
            return [(low, f"{low:,g}")]
        return [(t, f"{t:,g}") for t in nice_ticks(low, high) if low <= t <= high]
    powers = range(math.ceil(math.log10(max(low, 1e-12)) - 1e-9) if low > 0 else 0,
                   math.floor(math.log10(max(high, 1.0)) + 1e-9) + 1)  # fmt: skip
    every = -(-len(powers) // 7) or 1
    found = [(10.0**p, f"{10**p:,}" if 0 <= p < 4 else power_text(p)) for p in powers[::every]]
    return [(0.0, "0")] * (low == 0) + found


def _strip(tokens: Sequence[str]) -> Html:
    """The tokens that belong to the steps, in reading order."""
    shown = tokens[:_SHOWN_TOKENS]
    chips = [
        tag("span", tag("span", token_html(token)), cls="uh-chip", title=f"step {i}")
        for i, token in enumerate(shown)
    ]
    more = len(tokens) - len(shown)
    note = tag("p", f"and {more:,} more tokens", cls="uh-note") if more else Html("")
    return join([tag("div", *chips, cls="uh-strip"), note])
