"""Organisms: small models shipped with the library, whose task and mechanism are known.

An organism is one file of this folder (`town.py`): its words, its tasks, its recipe. Adding one is
adding a file that ends in `ORGANISM = Organism(...)`; `trainer.py` trains any of them and `card.py`
says how well it does. Weights lie in `weights/<name>` as an ordinary Hugging Face folder.

Nothing here imports torch, so listing organisms or drawing prompts costs milliseconds.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, cast

from underhood.core.errors import ModelNotFound, OutOfRange, UsageError, nearest
from underhood.organisms.card import Card

if TYPE_CHECKING:
    from underhood.organisms.wired_models import WIRED, wired  # noqa: F401

Split = Literal["train", "test"]

_HERE = Path(__file__).parent
# The line that makes a file of this folder an organism.
_MARK = "\nORGANISM = "
# One in this many keys (see `Case.key`) is held out of training.
_HELD_OUT = 7
# Draws that may miss the wanted split before we say that the task has no such cases.
_PATIENCE = 10_000

# The vocabulary starts with these, in this order, so their ids are the same in every organism.
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# Written without a space before them.
PUNCTUATION = (".", ",", "?", "!")


@dataclass(frozen=True)
class Case:
    """One drawn example of a task, in words; prompts, pairs and training rows are views of it.

    Attributes:
        words: The prompt, punctuation as separate words.
        answer: The right next word.
        contrast: A prompt of as many words, whose right next word is `wrong`. A case whose
            contrast is the prompt itself has none: it is trained on and never handed out.
        wrong: See `contrast`; never a right answer of `words`.
        key: What is held out together: all cases of one key are in the same split.
        contrast_key: The key that `contrast` would have.
        accept: All right next words, where there are several (`answer` is one of them).
        judged: How many of the last predictions are judged. With 1 only the answer is; with more,
            the last words of the prompt must be predicted as well.
        after: What follows the answer in a training row.
    """

    words: tuple[str, ...]
    answer: str
    contrast: tuple[str, ...]
    wrong: str
    key: str
    contrast_key: str
    accept: tuple[str, ...] = ()
    judged: int = 1
    after: tuple[str, ...] = (".",)


@dataclass(frozen=True)
class Task:
    """One thing that an organism has learned.

    Attributes:
        name: Identifier, as in `organism("town").pairs("capitals")`.
        summary: One line for humans, with an example.
        draw: Draws one case of any split.
        weight: Weight of the task's predictions in the training loss.
    """

    name: str
    summary: str
    draw: Callable[[Random], Case]
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one mix of tasks.

    Attributes:
        until: Fraction of all steps at which the phase ends; the last phase ends at 1.
        rows: Rows of each task in every batch.
    """

    until: float
    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Recipe:
    """Size of an organism and how it is trained.

    Attributes:
        layers: Transformer blocks.
        width: Size of the residual stream.
        heads: Attention heads of a block.
        mlp: Hidden units of a block's MLP.
        context: Most tokens that the model accepts.
        steps: Optimizer steps.
        lr: Peak learning rate (AdamW).
        warmup: Steps until the peak.
        stretch: Length of the learning rate's cosine, as a multiple of all steps.
        cooldown: Fraction of all steps, the last ones, in which the rate also falls to 0 linearly.
        decay: Weight decay.
        context_weight: Loss weight of words that cannot be foretold.
        phases: The mixes of tasks, in order.
    """

    layers: int
    width: int
    heads: int
    mlp: int
    context: int
    steps: int
    lr: float
    warmup: int
    stretch: float
    cooldown: float
    decay: float
    context_weight: float
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal token length that differ in what decides the answer."""

    task: str
    clean: str
    contrast: str
    answer: str
    wrong: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with what may follow it; see `Case` for `accept` and `judged`."""

    task: str
    text: str
    answer: str
    accept: tuple[str, ...]
    judged: int


@dataclass(frozen=True)
class Row:
    """A training row.

    Attributes:
        words: The row, from `<bos>` on; sentences end in `<eos>`.
        weights: Weight of predicting each word, as long as `words`; the first one is unused.
    """

    words: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Organism:
    """A small model with known tasks.

    Attributes:
        name: The name of its file and of its weights folder.
        summary: One line for humans.
        words: The whole vocabulary, by id, `SPECIAL` first.
        recipe: Size and training.
        limits: Known weaknesses, for the card.
    """

    name: str
    summary: str
    words: tuple[str, ...]
    recipe: Recipe
    limits: tuple[str, ...]
    _tasks: tuple[Task, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in self._tasks)

    @property
    def folder(self) -> Path:
        """Where the shipped weights lie (`AutoModelForCausalLM.from_pretrained(folder)`)."""
        return _HERE / "weights" / self.name

    @property
    def card(self) -> Card:
        """The card that was measured when the shipped weights were trained."""
        return Card.load(self.folder)

    def task(self, name: str) -> Task:
        """The task of this name.

        Raises:
            UsageError: no such task.
        """
        for task in self._tasks:
            if task.name == name:
                return task
        raise UsageError(
            f"Organism {self.name!r} has no task {name!r}.",
            given=name,
            do=f"Use one of: {', '.join(self.tasks)}.",
        )

    def cases(self, task: str, n: int, seed: int = 0, *, split: Split = "test") -> list[Case]:
        """Draw `n` cases of one split; the same arguments give the same cases.

        Draws are independent, so a task with few held-out combinations repeats some of them.
        Cost: microseconds a case.
        """
        if n < 0:
            raise OutOfRange("The number of cases is negative.", given=n, do="Ask for n >= 0.")
        if split not in ("train", "test"):
            raise UsageError("No such split.", given=split, do="Use 'train' or 'test'.")
        found = self.task(task)
        rng = Random(f"{self.name}:{task}:{split}:{seed}")
        return [_draw(found, rng, split, with_contrast=True) for _ in range(n)]

    def prompts(self, task: str, n: int, seed: int = 0, split: Split = "test") -> list[Prompt]:
        """Draw `n` prompts with their answers; see `cases`."""
        return [
            Prompt(task, join(case.words), case.answer, case.accept or (case.answer,), case.judged)
            for case in self.cases(task, n, seed, split=split)
        ]

    def pairs(self, task: str, n: int, seed: int = 0, split: Split = "test") -> list[Pair]:
        """Draw `n` pairs: equal token length, each answer one token, the two answers differ.

        With `split="test"` neither the clean nor the contrast prompt was seen in training.
        """
        return [
            Pair(task, join(case.words), join(case.contrast), case.answer, case.wrong)
            for case in self.cases(task, n, seed, split=split)
        ]

    def row(self, task: str, rng: Random) -> Row:
        """Draw one training row of a task (never of a held-out case)."""
        found = self.task(task)
        case = _draw(found, rng, "train", with_contrast=False)
        end = ("<eos>",) if case.after[-1:] == (".",) else ()
        words = ("<bos>", *case.words, case.answer, *case.after, *end)[: self.recipe.context]
        # Words before the judged ones are given, not predictable; a small weight teaches the
        # shape of sentences without drowning the answer.
        first = 2 + len(case.words) - case.judged
        weights = tuple(
            found.weight if i >= first else self.recipe.context_weight for i in range(len(words))
        )
        return Row(words, weights)

    def phase(self, step: int, steps: int) -> Phase:
        """The phase that step number `step` (from 0) of `steps` belongs to."""
        for phase in self.recipe.phases:
            if step < phase.until * steps:
                return phase
        return self.recipe.phases[-1]


def organisms() -> tuple[str, ...]:
    """Names of all organisms: the files of this folder that define one. Imports none of them."""
    files = (path for path in _HERE.glob("*.py") if path.stem != "__init__")
    return tuple(sorted(f.stem for f in files if _MARK in f.read_text(encoding="utf-8")))


def organism(name: str) -> Organism:
    """The organism of this name.

    Raises:
        ModelNotFound: no such organism.
    """
    known = organisms()
    if name not in known:
        raise ModelNotFound(
            f"No organism is called {name!r}.",
            given=name,
            why="an organism is a file of underhood/organisms, and there is none of this name.",
            do=f"Use one of: {nearest(name, known)}.",
        )
    return cast(Organism, importlib.import_module(f"underhood.organisms.{name}").ORGANISM)


def join(words: tuple[str, ...]) -> str:
    """Words as text: spaces between them, none before punctuation (as the tokenizer decodes)."""
    text = " ".join(words)
    for mark in PUNCTUATION:
        text = text.replace(f" {mark}", mark)
    return text


def held_out(key: str) -> bool:
    """Whether cases of this key are kept for testing. The same on every machine and version."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT == 0


def _draw(task: Task, rng: Random, split: Split, *, with_contrast: bool) -> Case:
    for _ in range(_PATIENCE):
        case = task.draw(rng)
        if with_contrast and case.contrast == case.words:
            continue
        if split == "train":
            # The contrast prompt is never trained on, so only the prompt's own key matters.
            if not held_out(case.key):
                return case
        elif held_out(case.key) and held_out(case.contrast_key):
            return case
    raise UsageError(
        f"Task {task.name!r} has no cases in its {split} split.",
        given=f"{_PATIENCE} draws, none of that split",
        do="Give the task more combinations, or a finer key.",
    )


def __getattr__(name: str) -> Any:
    """`wired` and `WIRED`, which need torch, are loaded when they are first used."""
    if name in ("wired", "WIRED"):
        return getattr(importlib.import_module("underhood.organisms.wired_models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
