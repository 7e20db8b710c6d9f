"""Backward passes that keep less: activations written out in several steps keep one tensor.

GPT-2's GELU is five operations, and each keeps its input for the backward pass, though all that is
needed is the activation's derivative at each number.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from underhood.core.model import Model
from underhood.core.relevance_parts import activation_kind, straight

__all__ = ["light", "written_out"]


def written_out(model: Model) -> list[nn.Module]:
    """A model's elementwise activations that are not torch's own (these keep one tensor anyway)."""
    return [
        module for module in model.module.modules()
        if not type(module).__module__.startswith("torch.nn") and activation_kind(module, model)
    ]  # fmt: skip


@contextmanager
def light(activations: Sequence[nn.Module]) -> Iterator[None]:
    """Elementwise activations keep their derivative alone, in this thread's forwards.

    Values are the same, bit for bit; gradients to rounding, once: no second derivatives.
    """
    thread = get_ident()

    def after(_module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not value.requires_grad or get_ident() != thread:
            return None
        (slope,) = torch.autograd.grad(value, x, torch.ones_like(value))
        return straight(value.detach(), x * slope)

    with ExitStack() as stack:
        for module in activations:
            stack.callback(module.register_forward_hook(after, prepend=True).remove)
        yield
