"""The one place for colours: three maps, and the limits that tie numbers to them.

A *scale* says what kind of number is drawn. `diverging`: signed, positive blue, negative red, white
at zero, symmetric limits. `sequential`: unsigned amounts, white to dark orange. `probability`: a
fixed 0 to 1, dark violet to yellow, so that two panels can always be compared.

Every map is a table of 255 colours (an odd number, so that the middle one is exactly white) and one
more index, 255, for "no value". HTML cells and PNG pixels look the colour up in the same table, so
they cannot disagree.

Example:
    >>> limits = limits_of([[-2.0, 0.0], [1.0, float("nan")]], "diverging")
    >>> limits.high, cell_colour(0.0, limits)
    (2.0, '#ffffff')
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

Scale = Literal["diverging", "sequential", "probability"]

MISSING = 255
"""Palette index of a missing value; transparent in the PNG, so that the hatching shows."""

_LEVELS = 255
ROBUST = 99.5  # percentile of |value| that becomes the limit when none is given

# ColorBrewer RdBu and Oranges, and viridis: ordered in lightness and safe for the colour blind.
_ANCHORS: dict[str, str] = {
    "diverging": "b2182b d6604d f4a582 fddbc7 ffffff d1e5f0 92c5de 4393c3 2166ac",
    "sequential": "ffffff fee6ce fdd0a2 fdae6b fd8d3c f16913 d94801 a63603 7f2704",
    "probability": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the two ends of a colour scale mean.

    Attributes:
        scale: the colour map.
        low: the value at the first colour.
        high: the value at the last colour.
        clipped: how many values lie beyond an end and are drawn in its colour.
        extreme: the value of largest magnitude (0 when there is none).
    """

    scale: Scale
    low: float
    high: float
    clipped: int = 0
    extreme: float = 0.0


@cache
def palette(scale: Scale) -> np.ndarray:
    """The 255 colours of a map, from low to high: uint8 `[255, 3]`, read only."""
    hexes = _ANCHORS[scale].split()
    anchors = np.array([[int(h[i : i + 2], 16) for i in (0, 2, 4)] for h in hexes], dtype=float)
    at = np.linspace(0, len(hexes) - 1, _LEVELS)
    columns = [np.interp(at, np.arange(len(hexes)), anchors[:, c]) for c in range(3)]
    table = np.stack(columns, axis=1).round().astype(np.uint8)
    table.setflags(write=False)
    return table


def limits_of(values: Any, scale: Scale, limit: float | int | None = None) -> Limits:
    """The limits for these values.

    Args:
        values: numbers of any shape; None and NaN count as missing.
        scale: the colour map. `probability` is always 0 to 1, whatever `limit` says.
        limit: the magnitude at the end of the scale. None takes the 99.5th percentile of the
            magnitudes, rounded up to a value that occurs, so fewer than 200 values never clip.
    """
    data = np.asarray(values, dtype=float).ravel()
    data = data[np.isfinite(data)]
    extreme = float(data[np.abs(data).argmax()]) if data.size else 0.0
    if scale == "probability":
        low, high = 0.0, 1.0
    else:
        if limit is None and data.size:
            limit = float(np.percentile(np.abs(data), ROBUST, method="higher"))
            # Nearly all cells zero: the percentile says nothing, the largest value does.
            limit = limit or abs(extreme)
        high = float(limit or 1.0)
        # An unsigned map has no colour for a negative number; a stray one must not look like zero.
        negative = scale == "diverging" or bool(data.size and data.min() < 0)
        low = -high if negative else 0.0
    slack = 1e-9 * (high - low)
    clipped = int(((data > high + slack) | (data < low - slack)).sum())
    return Limits(scale, low, high, clipped, extreme)


def indices(values: Any, limits: Limits) -> np.ndarray:
    """Palette indices of the values: uint8, same shape; missing values become `MISSING`."""
    data = np.asarray(values, dtype=float)
    missing = ~np.isfinite(data)
    # The distance between the largest numbers there are would overflow; that of halves does not.
    half = 0.5 if limits.high > 1e300 else 1.0
    low, high = half * limits.low, half * limits.high
    with np.errstate(over="ignore"):  # far beyond the limits
        share = (half * np.where(missing, limits.low, data) - low) / (high - low)
        levels = np.clip(np.rint(share * (_LEVELS - 1)), 0, _LEVELS - 1)
    return np.where(missing, MISSING, levels).astype(np.uint8)


def hex_of(index: int, scale: Scale) -> str:
    """`#rrggbb` of one palette index (not for `MISSING`)."""
    return "#" + bytes(palette(scale)[index]).hex()


def cell_colour(value: float | int, limits: Limits) -> str:
    """`#rrggbb` of one finite value."""
    return hex_of(int(indices(value, limits)), limits.scale)


def ink(background: str) -> str:
    """Black or white, whichever reads better on `#rrggbb` (WCAG contrast, at least 4.5 to 1)."""
    channels = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if luminance < 0.179 else "#000000"


def gradient(scale: Scale, stops: int = 9) -> str:
    """The map as a CSS `linear-gradient`, for legends."""
    at = np.linspace(0, _LEVELS - 1, stops).round().astype(int)
    return f"linear-gradient(90deg,{','.join(hex_of(int(i), scale) for i in at)})"
