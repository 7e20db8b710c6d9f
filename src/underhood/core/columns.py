"""Which columns of which projection make a head's queries, keys and values."""

import torch
from torch import Tensor

from underhood.core.anatomy import Attention
from underhood.core.model import Model
from underhood.core.taps.modules import weight_in_out

__all__ = ["columns_of"]

# How a fused projection's columns lie: all queries, keys, values one after the other, or head by
# head. A test compares every layout here with the values that the attention really uses.
FUSED = {"c_attn": "sections", "qkv_proj": "sections", "query_key_value": "heads"}


def columns_of(
    model: Model, spec: Attention
) -> dict[str, tuple[str, tuple[tuple[int, ...], ...]]] | None:
    """Paths and columns of a layer's q, k and v, head by head; None when they are not known."""
    if spec.heads is None:
        return None
    kv = spec.kv_heads or spec.heads
    counts = {"q": spec.heads, "k": kv, "v": kv}
    if all(f"{letter}_proj" in spec.projections for letter in "qkv"):
        found = {}
        for letter, heads in counts.items():
            path = spec.projections[f"{letter}_proj"]
            width = weight_in_out(model.module.get_submodule(path)).shape[1]
            if width % heads:
                return None
            found[letter] = path, _rows(torch.arange(width), heads)
        return found
    for name, layout in FUSED.items():
        path = f"{spec.core}.{name}"
        try:
            module = model.module.get_submodule(path)
        except AttributeError:
            continue
        return (
            _fused(path, weight_in_out(module).shape[1], counts, layout) if spec.interface else None
        )
    return None


def _fused(
    path: str, width: int, counts: dict[str, int], layout: str
) -> dict[str, tuple[str, tuple[tuple[int, ...], ...]]] | None:
    """Columns of a fused projection."""
    total = sum(counts.values())
    if width % total or (layout == "heads" and counts["q"] != counts["k"]):
        return None
    columns = torch.arange(width)
    if layout == "heads":
        parts = columns.view(counts["q"], 3, -1).unbind(1)
    else:
        size = width // total
        parts = columns.split([n * size for n in counts.values()])
    return {
        letter: (path, _rows(part.flatten(), counts[letter]))
        for letter, part in zip("qkv", parts, strict=True)
    }


def _rows(columns: Tensor, heads: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in columns.view(heads, -1).tolist())
