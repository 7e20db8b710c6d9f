"""Values as JSON can hold them: no NaN, no arrays, no objects."""

import math
from typing import Any

import numpy as np


def clean(value: Any) -> Any:
    """The value as JSON can hold it: arrays become lists, NaN and infinities None, the rest text.

    float32 and float16 numbers are written with the seven digits they have, not with the sixteen
    of the float64 nearest to them.
    """
    if isinstance(value, bool | str | int | None):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [clean(item) for item in value]
    if hasattr(value, "__array__"):
        return _array_list(np.asarray(value))
    return str(value)


def _array_list(array: np.ndarray) -> Any:
    if array.dtype.kind != "f":
        return clean(array.tolist())
    short = array.dtype.itemsize < 8
    data = array.astype(np.float64)
    finite = np.isfinite(data)
    if short:
        magnitude = np.abs(np.where(finite & (data != 0), data, 1.0))
        step = 10.0 ** (np.floor(np.log10(magnitude)) - 6)
        data = np.where(finite, np.round(data / step) * step, data)
        # The product has its own float64 dust; seven digits as text and back remove it.
        return _map(lambda x: float(f"{x:.7g}") if math.isfinite(x) else None, data.tolist())
    return data.tolist() if finite.all() else clean(data.tolist())


def _map(function: Any, nested: Any) -> Any:
    if isinstance(nested, list):
        return [_map(function, item) for item in nested]
    return function(nested)
