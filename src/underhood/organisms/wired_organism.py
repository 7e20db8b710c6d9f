"""What a wired organism is: a real model, its true edges, a reason for each, and its prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.organisms.wired_board import Board
from underhood.organisms.wired_build import build

__all__ = [
    "LETTERS",
    "Ablation",
    "Drawn",
    "Reasons",
    "Wired",
    "both",
    "finish",
    "letters",
    "only",
    "until",
]

Ablation = Literal["resample", "zero", "compiled"]
Reasons = dict[str, tuple[str, tuple[Ablation, ...]]]
"""Edge -> why it is true, and under which ablations."""

LETTERS = tuple("abcdefghij")
_PATIENCE = 1000


@dataclass(frozen=True, slots=True)
class Drawn:
    """One pair in words, without `<bos>`."""

    clean: tuple[str, ...]
    contrast: tuple[str, ...]
    answer: str
    wrong: str


@dataclass(frozen=True)
class Wired:
    """A small transformer whose weights were set by hand, with its circuit.

    Attributes:
        name: As in `wired(name)`.
        summary: One sentence.
        model: The loaded model.
        edges: All edges of its graph, as text: `a0.h1->a1.h0<k>`.
        truth: The true edges. `resample`: those that change the logit difference when they alone
            carry the contrast prompt's value. `zero`: those that change it when they alone carry
            nothing. `compiled`: those whose weights lead from source to logits at all, whether or
            not the prompts use them.
        reasons: Why each edge of `resample` and `zero` is true.
        card: What does what, in sentences.
        joint: Sets of heads, as text (`a0.h0+a1.h0`), and the share of the way from the clean to
            the contrast's logit difference that resampling all of them at once goes; only for
            organisms whose single effects hide something.
    """

    name: str
    summary: str
    model: Model
    edges: tuple[str, ...]
    truth: Mapping[str, frozenset[str]]
    reasons: Mapping[str, str]
    card: tuple[str, ...]
    joint: Mapping[str, float] = field(default_factory=dict)
    _draw: Callable[[Random], Drawn] = field(repr=False, kw_only=True)

    def pairs(self, n: int = 32, seed: int = 0) -> Pairs:
        """Draw clean and contrast prompts of equal length; the answer follows the last word.

        The same arguments give the same pairs. `wrong` is the contrast prompt's answer.

        Raises:
            OutOfRange: Fewer than one pair.
        """
        if n < 1:
            raise OutOfRange("pairs need at least one row", given=n, do="ask for n >= 1")
        rng = Random(f"{self.name}:{seed}")
        drawn = [self._draw(rng) for _ in range(n)]
        return Pairs(
            [" ".join(d.clean) for d in drawn],
            [" ".join(d.contrast) for d in drawn],
            [d.answer for d in drawn],
            [d.wrong for d in drawn],
        )

    def labels(self, ablation: Ablation = "resample") -> list[bool]:
        """Whether each of `edges` is true, for areas under curves."""
        return [edge in self.truth[ablation] for edge in self.edges]


def both(why: str) -> tuple[str, tuple[Ablation, ...]]:
    """A reason that holds under resample and zero ablation."""
    return why, ("resample", "zero")


def only(ablation: Ablation, why: str) -> tuple[str, tuple[Ablation, ...]]:
    """A reason that holds under one ablation."""
    return why, (ablation,)


def finish(
    board: Board,
    name: str,
    summary: str,
    *,
    reasons: Reasons,
    notes: tuple[str, ...],
    draw: Callable[[Random], Drawn],
    joint: Mapping[str, float] | None = None,
) -> Wired:
    """The organism of a board that is wired and distracted.

    Raises:
        UsageError: A true edge that the graph does not have.
    """
    edges = board.edges()
    if unknown := sorted(set(reasons) - set(edges)):
        raise UsageError(f"{name} has no such edges", given=", ".join(unknown), do="fix the names")
    truth: dict[str, frozenset[str]] = {
        kind: frozenset(e for e, (_, kinds) in reasons.items() if kind in kinds)
        for kind in ("resample", "zero")
    }
    truth["compiled"] = board.compiled()
    sentences = [summary, *notes]
    for edge, (why, kinds) in reasons.items():
        mark = "" if len(kinds) > 1 else f" ({', '.join(kinds)} ablation only)"
        sentences.append(f"{edge}{mark}: {why}.")
    return Wired(
        name,
        summary,
        build(board, name),
        edges,
        truth,
        {edge: why for edge, (why, _) in reasons.items()},
        tuple(sentences),
        dict(joint or {}),
        _draw=draw,
    )


def letters(
    length: int, solve: Callable[[tuple[str, ...]], str], *, words: tuple[str, ...] = LETTERS
) -> Callable[[Random], Drawn]:
    """Draws two prompts of random words whose answers differ."""

    def draw(rng: Random) -> Drawn:
        return until(rng, lambda: tuple(rng.choices(words, k=length)), solve)

    return draw


def until(
    rng: Random, make: Callable[[], tuple[str, ...]], solve: Callable[[tuple[str, ...]], str]
) -> Drawn:
    """Two prompts from `make` whose answers differ."""
    clean = make()
    for _ in range(_PATIENCE):
        contrast = make()
        if solve(contrast) != solve(clean):
            return Drawn(clean, contrast, solve(clean), solve(contrast))
    raise UsageError(
        "no contrast was found", given=" ".join(clean), do="let `make` draw more answers"
    )
