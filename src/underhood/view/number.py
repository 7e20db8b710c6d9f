"""How numbers are written: equal decimals within a panel, signs always, a true minus sign.

A panel's numbers share one precision (about three significant digits of its largest value), so
columns align and small numbers do not pretend to more digits than large ones.
"""

import math
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
"""Shown where there is no value."""


def decimals_for(values: Iterable[float | int | None]) -> int:
    """Decimals that give the largest finite value three digits; -1 asks for powers of ten."""
    finite = [abs(v) for v in values if v is not None and math.isfinite(v)]
    top = max(finite, default=0.0)
    if top == 0:
        return 0
    order = math.floor(math.log10(top) + 1e-9)
    return -1 if order < -3 or order > 5 else min(4, max(0, 2 - order))


def show(value: float | int | None, decimals: int, *, signed: bool = True) -> str:
    """One number as text; `+` only when `signed`, zero without sign, `–` when there is none.

    Args:
        value: the number; None, NaN and infinities count as missing.
        decimals: from `decimals_for`; -1 writes powers of ten.
        signed: print `+` before positive numbers.
    """
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(value):.{max(decimals, 0)}f}"
    if decimals < 0 and value:
        mantissa, _, power = f"{abs(value):.1e}".partition("e")
        text = f"{mantissa}×{power_text(int(power))}"
    elif float(text) == 0:
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text


def power_text(power: int) -> str:
    """A power of ten: `10⁻⁵`."""
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def plain(value: float | int | None) -> str:
    """One number for a machine: shortest exact decimal, empty when missing."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))
