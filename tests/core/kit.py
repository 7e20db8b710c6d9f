"""What the core's tests share: tiny models made once, and the plain way to do things."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jaxtyping
import torch
from torch import Tensor

import underhood as uh
from underhood.core.model import Model
from underhood.core.tokens import Tokens
from underhood.organisms.tiny import tiny

MADE: list[Model] = []
"""Every model that `model` has made, so that the leak check can look at all of them."""
HOOKS: dict[int, int] = {}
"""How many hooks each of them has by itself."""


@cache
def model(family: str, **overrides: Any) -> Model:
    """A tiny model, made once; no test may change it."""
    made = uh.load(f"random/{family}", **overrides)
    with torch.no_grad():  # transformers hooks its own listeners on a model in its first pass
        made.module(**inputs(family))
    HOOKS[id(made)] = hooks(made.module)
    MADE.append(made)
    return made


@cache
def twin(family: str, attention: str = "eager") -> Model:
    """The same weights with another attention implementation."""
    return model(family, attn_implementation=attention)


@cache
def inputs(family: str, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Inputs that the family takes."""
    return tiny(family).inputs(batch, length)


def rows(*lengths: int, seed: int = 1, low: int = 8, vocab: int = 99) -> list[list[int]]:
    """Random prompts of given lengths."""
    make = torch.Generator().manual_seed(seed)
    return [torch.randint(low, vocab, (n,), generator=make).tolist() for n in lengths]


def padded(prompts: list[list[int]], side: str = "right") -> Tokens:
    """Prompts as a rectangle; the padding holds id 0."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(prompts):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return Tokens(ids, mask)


def one(prompt: list[int]) -> Tensor:
    """One prompt as ids."""
    return torch.tensor([prompt])


def hooks(module: torch.nn.Module) -> int:
    """Hooks and replaced forwards in a model."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + int("forward" in vars(m))
        for m in module.modules()
    )


@contextmanager
def untyped() -> Iterator[None]:
    """As users run it: without the annotations' checks, so that our own refusals are reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape, (tuple(a.shape), tuple(b.shape))
    return float((a.detach().double() - b.detach().double()).abs().max())


def vector(width: int, seed: int = 0) -> Tensor:
    """A random vector."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))
