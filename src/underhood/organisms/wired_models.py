"""Transformers wired by hand: `wired("induction")` builds one and says what is inside.

Some 50 milliseconds, no training, no weights on disk: real GPT-2, Llama and GPT-NeoX models of
transformers. Circuits, whose true edges are known, are set by hand (`wired_heads`, `wired_gates`)
or compiled from a small program (`wired_programs`). Planted organisms (`planted_directions`,
`planted_superposition`, `planted_heads`, `planted_layers`) have known directions, dictionaries,
sinks, giants, voids, copies and neurons. Methods are tested against `truth`.

    >>> from underhood.organisms.wired_models import wired
    >>> organism = wired("previous_token")
    >>> sorted(organism.truth.edges["resample"])
    ['a0.h1->logits', 'input->a0.h1<v>']
    >>> organism.pairs(n=2).encode(organism.model).clean.ids.shape
    torch.Size([2, 7])
"""

import importlib
from typing import Any

from underhood.core.errors import ModelNotFound, nearest

__all__ = ["NAMES", "PLANTED", "WIRED", "wired"]

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

_PLANTED: dict[str, tuple[str, ...]] = {
    "planted_directions": ("directions", "affine", "backdoor"),
    "planted_superposition": ("superposition",),
    "planted_heads": ("sink", "copy", "successor"),
    "planted_layers": ("massive", "void", "duplicated", "bias_neurons"),
}

WIRED: tuple[str, ...] = tuple(name for names in _WHERE.values() for name in names)
"""Names of the wired circuits."""
PLANTED: tuple[str, ...] = tuple(name for names in _PLANTED.values() for name in names)
"""Names of the other wired organisms: what is planted in them are no circuits, but directions,
features, neurons, sinks."""
NAMES: tuple[str, ...] = (*WIRED, *PLANTED)


def wired(name: str) -> Any:
    """A freshly built organism with its model, prompts and truth.

    Args:
        name: One of `NAMES`; a `Wired` for a circuit, a `Planted` otherwise.

    Raises:
        ModelNotFound: No such organism.

    Cost: 20 to 100 ms once transformers is imported; models have 7,000 to 361,000 weights.
    """
    for module, names in (_WHERE | _PLANTED).items():
        if name in names:
            return getattr(importlib.import_module(f"underhood.organisms.{module}"), name)()
    raise ModelNotFound(
        f"no wired organism is called {name!r}",
        given=name,
        do=f"use one of: {nearest(name, NAMES, n=len(NAMES))}",
    )
