"""Planted organisms: hand-wired models in which what is known is not a circuit.

Directions, dictionaries, sinks, giants, neurons: `truth.facts` names the parts, the size of their
effect and that of a control, as the wiring makes them; `truth.arrays` has the directions. The tests
confirm every number on the module itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.organisms.base import Truth
from underhood.organisms.card import Fact
from underhood.organisms.wired_board import Board
from underhood.organisms.wired_build import build
from underhood.organisms.wired_organism import Kind, Made

__all__ = ["Planted", "hadamard", "plant", "swap"]


@dataclass(frozen=True)
class Planted(Made):
    """A small transformer in which directions, features, neurons or sinks were planted by hand."""


def plant(
    board: Board,
    name: str,
    summary: str,
    *,
    kinds: Mapping[str, Kind],
    facts: Sequence[Fact],
    arrays: Mapping[str, Tensor] | None = None,
    limits: tuple[str, ...] = (),
) -> Planted:
    """The organism of a board that is wired and distracted."""
    return Planted(
        f"wired/{name}",
        summary,
        build(board, name),
        Truth(tuple(facts), arrays=dict(arrays or {})),
        (summary, *(fact.says for fact in facts)),
        limits,
        kinds=kinds,
    )


def hadamard(size: int, seed: int) -> Float[Tensor, "d d"]:
    """An orthonormal basis whose rows use every coordinate alike: entries are `+-size ** -0.5`.

    For a size of 4, 16, 64 they are powers of two, so in float32 its rows are orthogonal exactly.
    """
    rows = torch.ones(1, 1)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    make = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=make) * 2.0 - 1.0
    return rows[torch.randperm(size, generator=make)] * signs * size**-0.5


def swap(words: tuple[str, ...], at: int, other: str) -> tuple[str, ...]:
    """The words with another one at a place."""
    return (*words[:at], other, *words[at + 1 :])
