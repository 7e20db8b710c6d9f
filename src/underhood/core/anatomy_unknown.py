"""What a block does with its stream that the anatomy cannot tell.

That the sub-layers add up to the stream is read from names. A block whose forward also multiplies
by a number or a vector of its own, or passes the stream through a part with a name that nobody
knows, may add something else: then nothing is claimed about what its parts add (`unknown-sum` in
`core.offers`), rather than something that is wrong.
"""

from collections.abc import Collection

import torch
from torch import nn

__all__ = ["LANES", "odd_attention", "unknown_parts"]

LANES = ("altup", "attn_hc")
"""Children by which a block mixes several copies of the stream: its input is no residual stream."""

# Numbers that a block's forward names and that leave an evaluation pass alone, or are known.
_PLAIN_NUMBERS = ("dropout", "residual_multiplier", "residual_scale")
# What a block adds beside its parts where only its code tells: GPT-NeoX Japanese has the attention
# hand its bias out.
_ADDS_MORE = ("GPTNeoXJapanese",)
# T5 keeps its sub-layers in a list; in Zamba 2, `linear` leads shared attention into the mixer.
_KNOWN_CHILDREN = ("layer", "linear", "pre_ln", "encoder_attn_layer_norm")
# Attentions whose heads are mixtures of experts, or differences of two patterns.
_ODD_ATTENTION = ("JetMoe", "DiffLlama")


def odd_attention(core: nn.Module) -> bool:
    """Whether an attention is not one softmax over keys per head, although it looks like one."""
    return type(core).__name__.startswith(_ODD_ATTENTION)


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
    if type(block).__name__.startswith(_ADDS_MORE):
        found.append("a bias of the attention")
    return tuple(dict.fromkeys(found))


def _is_unknown(
    name: str, value: object, known: Collection[str], multipliers: Collection[str]
) -> bool:
    if isinstance(value, nn.Module):
        has_weights = next(value.parameters(), None) is not None
        return has_weights and name not in known and name not in _KNOWN_CHILDREN
    if isinstance(value, float):
        return name not in multipliers and not name.endswith(_PLAIN_NUMBERS)
    return isinstance(value, torch.Tensor)
