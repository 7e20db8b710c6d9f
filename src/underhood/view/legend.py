"""Legends: what the colours mean, always with numbers at the ends."""

from collections.abc import Mapping, Sequence

from underhood.view.colour import Limits, gradient
from underhood.view.markup import Html, tag
from underhood.view.number import MINUS, decimals_for, show


def legend(
    limits: Limits,
    unit: str = "",
    *,
    missing: bool = False,
    marked: str = "",
    extra: Sequence[Html] = (),
) -> Html:
    """The colour bar of a panel.

    Args:
        limits: scale, ends, and how much was clipped.
        unit: of the numbers.
        missing: explain the hatching.
        marked: what outlined cells are; empty when there are none.
        extra: further remarks.
    """
    signed = limits.scale == "diverging"
    decimals = 0 if limits.scale == "probability" else decimals_for([limits.low, limits.high])
    ends = [show(x, decimals, signed=signed) for x in (limits.low, limits.high)]
    # Clipped ends are marked as such: the last colour then stands for "this or more".
    if limits.clipped:
        ends[1] = f"≥ {ends[1]}"
        ends[0] = f"≤ {ends[0]}" if limits.low < 0 else ends[0]
    bar = tag("span", cls="uh-ramp", style=f"background:{gradient(limits.scale)}")
    middle = tag("span", "0", cls="uh-zero") if limits.low < 0 else Html("")
    ramp = tag("span", tag("span", bar, middle, cls="uh-rampbox"), cls="uh-rampwrap")
    parts = [tag("span", tag("span", ends[0]), ramp, tag("span", ends[1]), cls="uh-key")]
    if unit:
        parts.append(tag("span", unit, cls="uh-unit"))
    if limits.scale != "probability":
        # In a page with scripts a reader can choose a logarithmic spread; this drawing has one.
        parts.append(tag("span", "linear colours"))
    if limits.clipped:
        extreme = show(limits.extreme, decimals_for([limits.extreme]), signed=signed)
        many = "1 value lies" if limits.clipped == 1 else f"{limits.clipped} values lie"
        parts.append(tag("span", f"{many} beyond the scale (most extreme: {extreme})"))
    if missing:
        parts.append(none_swatch())
    if marked:
        parts.append(tag("span", tag("span", cls="uh-swatch uh-marked"), marked))
    return tag("p", *parts, *extra, cls="uh-legend")


def none_swatch(what: str = "no value") -> Html:
    """The hatched square with its meaning."""
    return tag("span", tag("span", cls="uh-swatch uh-none"), what)


def swatch_row(*parts: Html) -> Html:
    """A legend line of already drawn parts."""
    return tag("p", *parts, cls="uh-legend")


def numbers(facts: Mapping[str, float | None]) -> Html:
    """The header of a panel: a few numbers, each under its name."""
    pairs = [tag("div", tag("dt", name), tag("dd", fact(value))) for name, value in facts.items()]
    return tag("dl", *pairs, cls="uh-numbers") if pairs else Html("")


def fact(value: float | None) -> str:
    """One number of a header, in three digits; whole numbers whole."""
    if value is not None and float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", MINUS)
    return show(value, decimals_for([value]), signed=False)
