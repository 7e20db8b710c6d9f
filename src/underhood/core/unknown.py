"""What a block does with its stream that the anatomy cannot tell.

That the sub-layers add up to the stream is read from names. A block whose forward also multiplies
by a number or a vector of its own, or passes the stream through a part with a name that nobody
knows, may add something else: then nothing is claimed about what its parts add (`unknown-sum` in
`core.offers`), rather than something that is wrong.
"""

from collections.abc import Collection

import torch
from torch import nn

from underhood.core.families import ADDS_MORE, KNOWN_CHILDREN, ODD_ATTENTION, PLAIN_NUMBERS

__all__ = ["odd_attention", "unknown_parts"]


def odd_attention(core: nn.Module) -> bool:
    """Whether an attention is not one softmax over keys per head, although it looks like one."""
    return type(core).__name__.startswith(ODD_ATTENTION)


def unknown_parts(
    block: nn.Module,
    mentioned: Collection[str],
    known: Collection[str],
    multipliers: Collection[str],
) -> tuple[str, ...]:
    """Names of what a block's forward uses and the anatomy does not know.

    Args:
        block: The block.
        mentioned: Names that its forward uses.
        known: Names of children whose role is known.
        multipliers: Names of numbers whose role is known.
    """
    found = [n for n in mentioned if _is_unknown(n, getattr(block, n, None), known, multipliers)]
    if type(block).__name__.startswith(ADDS_MORE):
        found.append("a bias of the attention")
    return tuple(dict.fromkeys(found))


def _is_unknown(
    name: str, value: object, known: Collection[str], multipliers: Collection[str]
) -> bool:
    if isinstance(value, nn.Module):
        has_weights = next(value.parameters(), None) is not None
        return has_weights and name not in known and name not in KNOWN_CHILDREN
    if isinstance(value, float):
        return name not in multipliers and not name.endswith(PLAIN_NUMBERS)
    return isinstance(value, torch.Tensor)
