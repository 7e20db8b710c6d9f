"""`sight/digits`: a small ResNet that reads real handwritten digits.

The 1797 pictures of 8 x 8 pixels that scikit-learn carries (`load_digits`: the test set of the UCI
"Optical Recognition of Handwritten Digits", by 13 writers), each pixel repeated four times in both
directions and for three colours, so that the network is that of `sight/cnn`. One picture in seven
is held out, by its number: of the same writers, then, as those learned from.
"""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from underhood.organisms.base import Recipe, Split, held_out
from underhood.organisms.sight.classifier import Case, Classifier, Task
from underhood.organisms.sight.cnn import SIZES

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.organisms.card import Fact

# Pixels of ours for one of theirs, along a side.
_REPEAT = 4
# Grey above which a pixel is ink.
_INK = 0.3


@cache
def _scans() -> tuple[np.ndarray, list[int]]:
    """All pictures `[1797, 8, 8]` from 0 to 1, and the digit on each."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return (found.images / 16).astype(np.float32), found.target.tolist()


@dataclass(frozen=True)
class Scan:
    """A picture of scikit-learn's.

    Attributes:
        number: Which one.
    """

    number: int

    @property
    def attributes(self) -> dict[str, Any]:
        """Its number."""
        return {"number": self.number}

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels `[3, 32, 32]`, and where the ink is `[32, 32]`."""
        scan = np.kron(_scans()[0][self.number], np.ones((_REPEAT, _REPEAT), np.float32))
        return np.stack([scan] * 3), scan > _INK


def _case(number: int, rng: Random) -> Case:
    """A picture. Contrast: one of another digit from the same split."""
    digits = _scans()[1]
    while True:
        other = rng.randrange(len(digits))
        if digits[other] != digits[number] and _tests(other) == _tests(number):
            return Case(Scan(number), digits[number], Scan(other), digits[other], _key(number))


def _tests(number: int) -> bool:
    return held_out(_key(number))


def _key(number: int) -> str:
    return f"digits:{number}"


def digits(rng: Random) -> Case:
    """Any picture."""
    return _case(rng.randrange(len(_scans()[1])), rng)


class Digits(Classifier):
    """A classifier whose pictures are given, not drawn."""

    def cases(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> list[Case]:
        """As `Classifier.cases`; every picture of the split comes once before any comes again."""
        _, rng = self.drawing(task, n, seed, split)
        numbers = [i for i in range(len(_scans()[1])) if _tests(i) == (split == "test")]
        found: list[Case] = []
        while len(found) < n:
            rng.shuffle(numbers)
            found += [_case(number, rng) for number in numbers[: n - len(found)]]
        return found


def _findings(organism: Classifier, model: "Model") -> "tuple[Fact, ...]":
    from underhood.organisms.sight import findings

    return (findings.channels(organism, model, "digits", "label", 4),)


ORGANISM = Digits(
    name="sight/digits",
    summary="real handwritten digits",
    classes=tuple("0123456789"),
    model_type="resnet",
    sizes=SIZES,
    recipe=Recipe(steps=300, lr=3e-3, warmup=20),
    kinds=(Task("digits", "a handwritten digit -> which one", digits),),
    limits=(
        "The pictures have 8 x 8 pixels, enlarged; it has seen no other digits.",
        "Held-out pictures are by the same 13 writers as those learned from.",
        "A contrast is another picture of another digit: real pictures do not differ in one thing.",
    ),
    findings=_findings,
)
