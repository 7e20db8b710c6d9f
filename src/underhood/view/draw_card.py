"""The card of a feature: where it acts, what it promotes, how often, and who is near."""

from collections.abc import Sequence

from underhood.view.colour import Limits, limits_of
from underhood.view.doc import Bars, Example, Feature, Histogram, Number
from underhood.view.draw_chart import bars
from underhood.view.draw_words import chips_of
from underhood.view.legend import legend, numbers
from underhood.view.markup import Html, join, tag
from underhood.view.number import decimals_for, show

_OPEN = 5  # examples shown before the rest is folded
_SHOWN = 10  # tokens on each side


def feature(view: Feature) -> Html:
    """Header numbers, examples in context, logits, histograms, neighbours."""
    limits = limits_of([v for e in view.examples for v in e.values], "sequential")
    shown = [_example(example, limits, view.unit) for example in view.examples]
    parts = [numbers(view.facts), *shown[:_OPEN]]
    if len(shown) > _OPEN:
        told = tag("summary", f"the other {len(shown) - _OPEN} examples")
        parts.append(tag("details", told, *shown[_OPEN:], cls="uh-more"))
    if shown:
        parts.append(legend(limits, view.unit))
    lists = (
        ("promoted tokens", view.promoted, "logits"),
        ("suppressed tokens", view.suppressed, "logits"),
        ("neighbours", view.neighbours, "cosine"),
    )
    columns = [_ranked(name, pairs, unit) for name, pairs, unit in lists if pairs]
    columns += [_histogram(h) for h in view.histograms]
    parts.append(tag("div", *columns, cls="uh-columns") if columns else Html(""))
    return join(parts)


def _example(example: Example, limits: Limits, unit: str) -> Html:
    note = tag("p", example.note, cls="uh-note") if example.note else Html("")
    chips = chips_of(example.tokens, example.values, limits, unit)
    return tag("div", note, chips, cls="uh-example")


def _ranked(name: str, pairs: Sequence[tuple[str, Number]], unit: str) -> Html:
    some = pairs[:_SHOWN]
    if len(pairs) > len(some):
        name += f" ({len(some)} of {len(pairs)})"
    view = Bars(labels=[label for label, _ in some], values=[v for _, v in some], unit=unit)
    return tag("div", tag("p", name, cls="uh-label"), bars(view), cls="uh-ranked")


def _histogram(found: Histogram) -> Html:
    """Counts as bars that touch, with the ends of the axis below."""
    top = max(found.counts, default=0.0) or 1.0
    low, high = found.edges[0], found.edges[-1]
    span = (high - low) or 1.0
    shapes = []
    for count, left, right in zip(found.counts, found.edges, found.edges[1:], strict=False):
        tall = 100 * count / top
        box = {"x": 100 * (left - low) / span, "width": 100 * (right - left) / span}
        sized = {key: f"{value:.3f}" for key, value in box.items()}
        shapes.append(tag("rect", **sized, y=f"{100 - tall:.2f}", height=f"{tall:.2f}"))
    svg = tag("svg", *shapes, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")
    decimals = decimals_for([low, high])
    ends = [tag("span", show(x, decimals, signed=False)) for x in (low, high)]
    total = f"{sum(found.counts):,.0f} values, at most {max(found.counts, default=0):,.0f} in a bin"
    return tag(
        "div",
        tag("p", found.name, cls="uh-label"),
        tag("div", svg, cls="uh-hist", role="img", aria_label=f"{found.name}: {total}"),
        tag("div", *ends, cls="uh-ends"),
        tag("p", total, cls="uh-note"),
        cls="uh-ranked",
    )
