"""What the methods share that read the stream through the unembedding: who has one, how exact."""

import torch

from underhood.core.errors import NotOffered
from underhood.core.head import Head
from underhood.core.model import Model

__all__ = ["head_of", "tolerance"]

_HALF = 2e-2  # a float16 or bfloat16 stream keeps two to three digits over its layers
_FULL = 1e-4


def head_of(model: Model) -> Head:
    """The way from the stream to the logits, in a model that reads one text and continues it.

    Raises:
        NotOffered: No blocks, no unembedding, or an encoder and a decoder.
    """
    head = Head(model)
    if model.main == "dec":
        raise NotOffered(
            "this method reads models with one stack",
            given=repr(model),
            why="the prompt goes to the encoder, and the decoder's stream belongs to other tokens",
            do="use model.run with decoder_input_ids, and model.unembed on dec.resid_post.N",
        )
    if not model.n_layers:
        raise NotOffered(
            "no residual stream was found in this model",
            given=repr(model),
            why="this is a plain torch module, or its parts have names that nobody knows",
            do="use model.run with module: sites",
        )
    return head


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same logits may differ, relative to their size."""
    return _HALF if dtype in (torch.float16, torch.bfloat16) else _FULL
