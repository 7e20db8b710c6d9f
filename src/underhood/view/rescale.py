"""What happens to a view between the document and its drawing: fair scales, readable numbers.

A claim and its control are drawn with the same limits, as otherwise noise on its own scale looks
like an effect. Very small and very large numbers are drawn in powers of ten of their unit, `4.3` in
`10⁻⁵ nats`: five digits of exponent in every cell would hide the one that differs. Both change the
drawing only, never the document.
"""

import math
import sys
from typing import TypeVar

from underhood.view.colour import limits_of
from underhood.view.doc import Bars, Grid, Lines, Number, Series, Timeline, Tokens, View
from underhood.view.number import power_text

_V = TypeVar("_V", bound=View)

_SMALLEST, _LARGEST = -3, 5  # powers of ten that are still written out


def share_scale(claim: View, control: View) -> tuple[View, View]:
    """Claim and control with common limits, where both draw the same kind of number."""
    if isinstance(claim, Grid | Tokens) and isinstance(control, Grid | Tokens):
        if claim.scale == control.scale and claim.unit == control.unit and control.limit is None:
            # The claim's limit, not the larger of the two: a control beyond it is marked as such.
            high = limits_of(claim.values or [], claim.scale, claim.limit).high
            return claim, control.model_copy(update={"limit": high})
    if isinstance(claim, Bars) and isinstance(control, Bars):
        if claim.unit == control.unit and claim.span is None and control.span is None:
            span = {"span": bar_span(claim, control)}
            return claim.model_copy(update=span), control.model_copy(update=span)
    if isinstance(claim, Lines | Timeline) and isinstance(control, Lines | Timeline):
        if claim.y_name == control.y_name and claim.span is None and control.span is None:
            span = {"span": line_span(claim, control)}
            return claim.model_copy(update=span), control.model_copy(update=span)
    return claim, control


def rescaled(view: _V) -> _V:
    """The view in powers of ten of its unit, if its numbers are very small or very large."""
    match view:
        case Grid() | Tokens():
            high = limits_of(view.values or [], view.scale, view.limit).high
            power = _power(0.0 if view.scale == "probability" else high)
            if not power or view.values is None:
                return view
            values = [
                _over(v, power) if not isinstance(v, list) else _list(v, power) for v in view.values
            ]
            update = {
                "values": values,
                "limit": _over(high, power),
                "unit": _unit(view.unit, power),
            }
            return view.model_copy(update=update)
        case Bars():
            ends = view.span or bar_span(view)
            power = _power(max(map(abs, ends)))
            if not power:
                return view
            bands = view.baseline
            update = {
                "values": _list(view.values, power),
                "total": _over(view.total, power),
                "baseline": bands and [(_over(a, power), _over(b, power)) for a, b in bands],
                "span": tuple(_list(list(ends), power)),
                "unit": _unit(view.unit, power),
            }
            return view.model_copy(update=update)
        case Lines() | Timeline():
            ends = view.span or line_span(view)
            power = _power(max(map(abs, ends)))
            if not power:
                return view
            update = {
                "series": [_series(line, power) for line in view.series],
                "span": view.span and tuple(_list(list(view.span), power)),
                "y_name": _unit(view.y_name, power),
            }
            return view.model_copy(update=update)
    return view


def bar_span(*views: Bars) -> tuple[float, float]:
    """The ends of an axis that holds every bar and baseline of the views, and zero."""
    numbers = [0.0]
    for view in views:
        numbers += [v for v in view.values if v is not None]
        numbers += [v for pair in view.baseline or [] for v in pair if v is not None]
    low, high = min(numbers), max(numbers)
    return (low, high) if high > low else (0.0, 1.0)


def line_span(*views: Lines | Timeline) -> tuple[float, float]:
    """The ends of a y axis that holds every line and band of the views."""
    numbers = [
        v
        for view in views
        for line in view.series
        for values in (line.values, line.low or [], line.high or [])
        for v in values
        if v is not None
    ]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    if high > low:
        return low, high
    margin = 0.5 * abs(low) or 0.5
    most = sys.float_info.max
    return max(low - margin, -most), min(high + margin, most)


def _power(top: float) -> int:
    """The power of ten to take out, a multiple of three; 0 for numbers of ordinary size."""
    if top == 0:
        return 0
    order = math.floor(math.log10(top) + 1e-9)
    return 0 if _SMALLEST <= order <= _LARGEST else 3 * (order // 3)


def _over(value: Number, power: int) -> Number:
    # Two steps, as 10.0 ** 308 and beyond would overflow for the smallest numbers there are.
    return None if value is None else value / 10.0 ** (power // 2) / 10.0 ** (power - power // 2)


def _list(values: list[Number], power: int) -> list[Number]:
    return [_over(v, power) for v in values]


def _series(line: Series, power: int) -> Series:
    parts = {name: getattr(line, name) for name in ("values", "low", "high")}
    return line.model_copy(update={k: v and _list(v, power) for k, v in parts.items()})


def _unit(unit: str, power: int) -> str:
    return f"{power_text(power)} {unit}" if unit else f"× {power_text(power)}"
