"""Transformers with known circuits: `wired("induction")` builds one and says which edges are true.

Some 50 milliseconds, no training, no files: real GPT-2, Llama and GPT-NeoX models of transformers
whose weights are set by hand (`wired_heads`, `wired_gates`) or compiled from a small program
(`wired_programs`). Methods that find circuits are tested against `truth`.

    >>> from underhood.organisms.wired_models import wired
    >>> organism = wired("previous_token")
    >>> sorted(organism.truth["resample"])
    ['a0.h1->logits', 'input->a0.h1<v>']
    >>> organism.pairs(2).encode(organism.model).clean.ids.shape
    torch.Size([2, 7])
"""

import importlib
from typing import TYPE_CHECKING

from underhood.core.errors import ModelNotFound, nearest

if TYPE_CHECKING:
    from underhood.organisms.wired_organism import Wired

__all__ = ["WIRED", "wired"]

_WHERE = {
    "wired_heads": ("previous_token", "induction", "gqa", "decoy"),
    "wired_gates": ("xor", "parallel", "backup", "redundant", "linear"),
    "wired_programs": (
        "shift_by",
        "reverse",
        "proportion",
        "hist",
        "parity",
        "sort_unique",
        "pattern",
    ),
}

WIRED: tuple[str, ...] = tuple(name for names in _WHERE.values() for name in names)
"""Names of all wired organisms."""


def wired(name: str) -> "Wired":
    """A freshly built organism with its model, prompts and true edges.

    Args:
        name: One of `WIRED`.

    Raises:
        ModelNotFound: No such organism.

    Cost: 20 to 100 ms once transformers is imported; models have 7,000 to 116,000 weights.
    """
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"underhood.organisms.{module}"), name)()
    raise ModelNotFound(
        f"no wired organism is called {name!r}",
        given=name,
        do=f"use one of: {nearest(name, WIRED, n=len(WIRED))}",
    )
