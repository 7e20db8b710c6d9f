"""What parts of a model are called, everywhere: `a3.h0`, `m3`, `m3.n57`.

These are the names of circuit files (MIB, EAP-IG). A part is what writes; a site (`z.3.0`) is where
a tensor stands.
"""

import re
from typing import Literal

from underhood.core.errors import UsageError

__all__ = ["PartKind", "head_named", "part_name"]

PartKind = Literal["attention", "head", "mlp", "neuron", "expert", "layer"]

_FORMS: dict[str, str] = {
    "attention": "a{layer}",
    "head": "a{layer}.h{unit}",
    "mlp": "m{layer}",
    "neuron": "m{layer}.n{unit}",
    "expert": "m{layer}.e{unit}",
    "layer": "layer {layer}",
}


def part_name(kind: PartKind, layer: int, unit: int | None = None) -> str:
    """The name of a part.

    Args:
        kind: What it is. "attention" is all heads of a layer together.
        layer: Its layer, from 0.
        unit: Which head, neuron or expert of the layer, from 0.

    Example:
        >>> part_name("head", 3, 0), part_name("mlp", 3)
        ('a3.h0', 'm3')
    """
    return _FORMS[kind].format(layer=layer, unit=unit)


def head_named(name: str) -> tuple[int, int]:
    """Layer and head of `a3.h0`; `3.0` and the site `z.3.0` are read as well.

    Raises:
        UsageError: It names no head.

    Example:
        >>> head_named("a3.h0"), head_named("3.0")
        ((3, 0), (3, 0))
    """
    found = re.fullmatch(r"(?:a(\d+)\.h|(?:z\.)?(\d+)\.)(\d+)", name)
    if found is None:
        raise UsageError(
            f"{name!r} names no head", given=name, do="write aLAYER.hHEAD or LAYER.HEAD, e.g. a1.h2"
        )
    return int(found[1] or found[2]), int(found[3])
