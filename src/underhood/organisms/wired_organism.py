"""What is made by hand: a real model, what was wired into it and why, and its prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from underhood.core.errors import UsageError
from underhood.core.loading import as_device, as_dtype
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.organisms.base import PROMPTS, SEED, Organism, Split, Truth
from underhood.organisms.card import Card, Fact
from underhood.organisms.language import Prompt, judge
from underhood.organisms.wired_board import Board
from underhood.organisms.wired_build import build

__all__ = [
    "LETTERS",
    "Ablation",
    "Drawn",
    "Kind",
    "Made",
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


@dataclass(frozen=True, slots=True)
class Kind:
    """A task of an organism that is made by hand: one line about it, and what draws a pair."""

    says: str
    draw: Callable[[Random], Drawn]


@dataclass(frozen=True)
class Made(Organism):
    """An organism that is made in memory, by hand: nothing is trained, and only its card is kept.

    Attributes:
        name: As in `uh.load(name)`: "wired/xor".
        summary: One sentence.
        model: The loaded model.
        truth: What was wired in.
        mechanism: What does what, in sentences.
        limits: Known weaknesses.
        kinds: Its tasks.
    """

    name: str
    summary: str
    model: Model
    truth: Truth
    mechanism: tuple[str, ...]
    limits: tuple[str, ...] = ()
    kinds: Mapping[str, Kind] = field(kw_only=True, repr=False)

    @property
    def tasks(self) -> Mapping[str, str]:
        """Name of each task, and one line about it."""
        return {name: kind.says for name, kind in self.kinds.items()}

    def load(self, folder: Path | None = None, **options: Any) -> Model:
        """The model; `folder` is not used.

        Raises:
            UsageError: An option other than `device` and `dtype`.
        """
        device, dtype = options.pop("device", None), as_dtype(options.pop("dtype", None))
        if options:
            raise UsageError(
                f"{self.name} is made in memory", given=f"{', '.join(options)}",
                do="give no options but device and dtype",
            )  # fmt: skip
        if device is not None or dtype is not None:
            self.model.module.to(device=as_device(device), dtype=dtype)
        return self.model

    def build(self, out: Path | None = None, **options: Any) -> Card:
        """Measure it and write its card. There is nothing to train, so options change nothing."""
        module = self.model.module
        card = Card(
            name=self.name,
            summary=self.summary,
            parameters=sum(p.numel() for p in module.parameters()),
            architecture={"class": type(module).__name__},
            recipe={},
            seconds=0.0,
            tasks=self.measure(self.model),
            facts=list(self.truth.facts),
            limits=list(self.limits),
            reproduce=[f"underhood organisms {do} {self.name}" for do in ("build", "check")],
        )
        card.save(out or self.built)
        return card

    def prompts(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> list[Prompt]:
        """Draw prompts with their answers. Nothing is trained, so both splits are the same."""
        name = self.task(task)
        drawn = self._drawn(name, n, seed)
        return [Prompt(name, " ".join(d.clean), d.answer, (d.answer,)) for d in drawn]

    def pairs(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> Pairs:
        """Draw clean and contrast prompts of equal length; the answer follows the last word.

        The same arguments give the same pairs. `wrong` is the contrast prompt's answer.

        Raises:
            PairError: Fewer than one pair.
        """
        drawn = self._drawn(self.task(task), n, seed)
        return Pairs(
            [" ".join(d.clean) for d in drawn],
            [" ".join(d.contrast) for d in drawn],
            [d.answer for d in drawn],
            [d.wrong for d in drawn],
        )

    def measure(self, model: Model, n: int = PROMPTS, seed: int = SEED) -> dict[str, Any]:
        """As `Organism.measure`."""
        return {name: self._measured(name, model, n, seed) for name in self.tasks}

    def _measured(self, task: str, model: Model, n: int, seed: int) -> dict[str, Any]:
        right, probability = judge(self.prompts(task, n, seed), model)
        mean = sum(probability) / max(1, n)
        return {"accuracy": sum(right) / max(1, n), "probability": round(mean, 4), "n": n}

    def _drawn(self, task: str, n: int, seed: int) -> list[Drawn]:
        self._need(n)
        rng = Random(f"{task}:{seed}")
        return [self.kinds[task].draw(rng) for _ in range(n)]


@dataclass(frozen=True)
class Wired(Made):
    """A small transformer whose weights were set by hand, with its circuit; one task, of its name.

    Attributes:
        truth: Its `edges` are the true ones. `resample`: those that change the logit difference
            when they alone carry the contrast prompt's value. `zero`: those that change it when
            they alone carry nothing. `compiled`: those whose weights lead from source to logits at
            all, whether or not the prompts use them. A fact for each of the first two says why.
        edges: All edges of its graph, as text: `a0.h1->a1.h0<k>`.
        joint: Sets of heads, as text (`a0.h0+a1.h0`), and the share of the way from the clean to
            the contrast's logit difference that resampling all of them at once goes; only for
            organisms whose single effects hide something.
    """

    edges: tuple[str, ...] = field(kw_only=True)
    joint: Mapping[str, float] = field(default_factory=dict, kw_only=True)

    def labels(self, ablation: Ablation = "resample") -> list[bool]:
        """Whether each of `edges` is true, for areas under curves."""
        return [edge in self.truth.edges[ablation] for edge in self.edges]


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
    true: dict[str, frozenset[str]] = {
        kind: frozenset(e for e, (_, kinds) in reasons.items() if kind in kinds)
        for kind in ("resample", "zero")
    }
    true["compiled"] = board.compiled()
    facts, sentences = [], [summary, *notes]
    for edge, (why, kinds) in reasons.items():
        mark = "" if len(kinds) > 1 else f" ({', '.join(kinds)} ablation only)"
        sentences.append(f"{edge}{mark}: {why}.")
        facts.append(
            Fact(edge, f"{why}.", (edge,), name, how=f"wired; under {' and '.join(kinds)}")
        )
    return Wired(
        f"wired/{name}",
        summary,
        build(board, name),
        Truth(tuple(facts), true),
        tuple(sentences),
        kinds={name: Kind(summary, draw)},
        edges=edges,
        joint=dict(joint or {}),
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
