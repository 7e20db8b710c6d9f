"""How numbers are written: equal decimals within a panel, signs always, a true minus sign.

A panel's numbers share one precision (about three significant digits of its largest value), so
columns align and small numbers do not pretend to more digits than large ones.
"""

import math
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
"""Shown where there is no value."""


def decimals_for(values: Iterable[float | None]) -> int:
    """Decimals that give the largest finite value three digits; -1 asks for powers of ten."""
    finite = [abs(v) for v in values if v is not None and math.isfinite(v)]
    top = max(finite, default=0.0)
    if top == 0:
        return 0
    order = math.floor(math.log10(top) + 1e-9)
    return -1 if order < -3 or order > 5 else min(4, max(0, 2 - order))


def show(
    value: float | None, decimals: int, *, signed: bool = True, ascii_only: bool = False
) -> str:
    """One number as text; `+` only when `signed`, zero without sign, `–` when there is none.

    Args:
        value: the number; None, NaN and infinities count as missing.
        decimals: from `decimals_for`; -1 writes powers of ten.
        signed: print `+` before positive numbers.
        ascii_only: `-` instead of the typographic minus, for files that programs read.
    """
    if value is None or not math.isfinite(value):
        return "" if ascii_only else NONE
    text = f"{abs(value):.1e}" if decimals < 0 and value else f"{abs(value):.{max(decimals, 0)}f}"
    if float(text) == 0:
        return text
    minus = "-" if ascii_only else MINUS
    return (minus if value < 0 else "+" if signed else "") + text


def plain(value: float | None) -> str:
    """One number for a machine: shortest exact decimal, empty when missing."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))
