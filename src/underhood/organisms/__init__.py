"""Organisms: small models that come with the library, whose task and mechanism are known.

    >>> import underhood as uh
    >>> town = uh.organisms.organism("town")
    >>> pairs = town.pairs("capitals", 4)
    >>> model = town.load()                                          # the same as uh.load("town")

An organism is one file: its data, its recipe, its known facts, ending in `ORGANISM = ...`; its name
is the file's path (`sight/cnn.py` is "sight/cnn", `town_chat.py` is "town-chat"). `trainer.py`
trains any of them; weights and card lie in `weights/<name>`. The hand-wired ones have only a card:
"wired/xor" is built when it is asked for.

Nothing here imports torch, so listing organisms or drawing prompts costs milliseconds.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from underhood.core.errors import ModelNotFound, nearest
from underhood.organisms.base import Organism, Recipe, Split, Trained, Truth, held_out
from underhood.organisms.card import Card, Fact
from underhood.organisms.language import Case, Language, Phase, Prompt, Row, Task
from underhood.organisms.words import PUNCTUATION, SPECIAL, join

if TYPE_CHECKING:
    from underhood.organisms.wired_models import WIRED, wired

__all__ = [
    "PUNCTUATION", "SPECIAL", "WIRED", "Card", "Case", "Fact", "Language", "Organism", "Phase",
    "Prompt", "Recipe", "Row", "Split", "Task", "Trained", "Truth", "card_of", "held_out", "join",
    "organism", "organisms", "wired",
]  # fmt: skip

_HERE = Path(__file__).parent
# The line that makes a file of this folder an organism.
_MARK = "\nORGANISM = "
_WIRED = "wired/"


def organisms() -> tuple[str, ...]:
    """Names of all organisms, those wired by hand last. Imports none of them."""
    from underhood.organisms.wired_models import NAMES

    return (*sorted(_files()), *(f"{_WIRED}{name}" for name in NAMES))


def organism(name: str) -> Organism:
    """The organism of this name.

    Raises:
        ModelNotFound: No such organism.

    Example:
        >>> organism("town").prompts("capitals", 1)[0].task
        'capitals'
    """
    if name in (files := _files()):
        return importlib.import_module(f"underhood.organisms.{files[name]}").ORGANISM
    known = organisms()
    if name not in known:
        raise ModelNotFound(
            f"No organism is called {name!r}.",
            given=name,
            why="an organism is a file of underhood/organisms, and there is none of this name.",
            do=f"Use one of: {nearest(name, known)}.",
        )
    from underhood.organisms.wired_models import wired

    return wired(name.removeprefix(_WIRED))


def card_of(name: str) -> Card:
    """The card of the organism of this name, read from its file where the package carries one.

    Raises:
        ModelNotFound: No such organism.
        FileProblem: It is neither shipped nor built.
    """
    shipped = _HERE / "weights" / name
    return Card.load(shipped) if shipped.is_dir() else organism(name).card


def _files() -> dict[str, str]:
    """Name of each organism that is a file, and its module."""
    found = {}
    for path in _HERE.rglob("*.py"):
        if path.name != "__init__.py" and _MARK in path.read_text(encoding="utf-8"):
            parts = path.relative_to(_HERE).with_suffix("").parts
            found["/".join(parts).replace("_", "-")] = ".".join(parts)
    return found


def __getattr__(name: str) -> Any:
    """`wired` and `WIRED`, which need torch, are loaded when they are first used."""
    if name in ("wired", "WIRED"):
        return getattr(importlib.import_module("underhood.organisms.wired_models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
