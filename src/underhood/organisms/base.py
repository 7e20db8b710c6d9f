"""What every organism offers: tasks with prompts and pairs, a model, a card, what is known of it.

An organism is a file of this package that ends in `ORGANISM = ...` (or an entry of `wired_models`).
Its name is the file's path: `town.py` is "town", `sight/cnn.py` is "sight/cnn".

Nothing here imports torch, so listing organisms costs milliseconds.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from underhood.core.errors import FileProblem, OutOfRange, UsageError
from underhood.organisms.card import Card, Fact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from underhood.core.model import Model

__all__ = [
    "PROMPTS",
    "Drawn",
    "Kind",
    "Organism",
    "Recipe",
    "Split",
    "Trained",
    "Truth",
    "held_out",
]

Split = Literal["train", "test"]
PROMPTS, SEED = 500, 1
"""Prompts per task and the seed they are drawn with, for the numbers of a card."""

STEPS = "steps"
"""The folder of the weights that `Recipe.keep` asks for: `steps/400.safetensors`."""

LOG = "training.csv"
"""The file of the losses of a training run, in nats: step,loss."""

_HERE = Path(__file__).parent
# One in this many keys is held out of training.
_HELD_OUT = 7


@dataclass(frozen=True)
class Truth:
    """What is known to be inside a model, for programs.

    Attributes:
        facts: Each with the parts it is about, its effect and the effect of its control.
        edges: By ablation, the true edges of its circuit (wired circuits only).
        arrays: Directions, dictionaries and the like, by name.
    """

    facts: tuple[Fact, ...] = ()
    edges: Mapping[str, frozenset[str]] = field(default_factory=dict)
    arrays: "Mapping[str, Tensor]" = field(default_factory=dict)

    def __getitem__(self, name: str) -> Fact:
        """The fact of this name.

        Raises:
            UsageError: No such fact.
        """
        for fact in self.facts:
            if fact.name == name:
                return fact
        known = [fact.name for fact in self.facts]
        raise UsageError("no such fact is known", given=name, do=f"use one of: {', '.join(known)}")


class Organism(ABC):
    """A small model whose tasks and mechanism are known.

    Attributes:
        name: As in `uh.load(name)`.
        summary: One line.
        limits: Known weaknesses, for the card.
        truth: What is known to be inside.
    """

    name: str
    summary: str
    limits: tuple[str, ...]
    truth: Truth

    @property
    @abstractmethod
    def tasks(self) -> Mapping[str, str]:
        """Name of each task, and one line about it."""

    @abstractmethod
    def load(self, folder: Path | None = None, **options: Any) -> "Model":
        """The model, ready to run.

        Args:
            folder: Where its weights lie; by default `self.folder`.
            options: As of `uh.load`.

        Raises:
            FileProblem: Its weights are missing.
        """

    @abstractmethod
    def prompts(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> Any:
        """`n` things that the model reads, with what is right; the same arguments, the same ones.

        Args:
            task: One of `tasks`; may be left out where there is only one.
            n: How many.
            seed: Decides the draw.
            split: "test" draws what was held out of training.
        """

    @abstractmethod
    def pairs(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> Any:
        """As `prompts`, each beside a contrast that differs in what decides the answer."""

    @abstractmethod
    def measure(self, model: "Model", n: int = PROMPTS, seed: int = SEED) -> dict[str, Any]:
        """Per task its numbers on held-out prompts: `accuracy`, `n`, and what else tells.

        Args:
            model: The organism's model, or another one that does the same tasks.
            n: Prompts per task.
            seed: Seed of the prompts.
        """

    @abstractmethod
    def build(self, out: Path | None = None, **options: Any) -> Card:
        """Make the model again from nothing, measure it, and write its folder and card.

        Args:
            out: The folder; by default one in the user's cache, where `load` looks for what the
                package does not carry. What the package carries is not touched.
            options: Of the trainer: `steps`, `seed`, `resume`, `progress`.
        """

    @property
    def folder(self) -> Path:
        """Where its card and weights lie: in the package, or else where `build` puts them."""
        shipped = _HERE / "weights" / self.name
        return shipped if shipped.is_dir() else self.built

    @property
    def built(self) -> Path:
        """Where `build` puts it: in `$UNDERHOOD_HOME`, or else in the user's cache."""
        home = os.environ.get("UNDERHOOD_HOME")
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(home) if home else Path(cache) / "underhood"
        return base / "organisms" / self.name

    @property
    def card(self) -> Card:
        """What was measured when it was built.

        Raises:
            FileProblem: It is neither shipped nor built.
        """
        return Card.load(self.folder)

    def task(self, name: str | None) -> str:
        """The task of this name, or the only one.

        Raises:
            UsageError: No such task, or none named where there are several.
        """
        known = tuple(self.tasks)
        if name is None and len(known) == 1:
            return known[0]
        if name not in known:
            said = "which task?" if name is None else f"{self.name!r} has no task {name!r}"
            raise UsageError(said, given=f"task={name!r}", do=f"use one of: {', '.join(known)}")
        return name

    def evaluate(self, n: int = PROMPTS, seed: int = SEED, folder: Path | None = None) -> Any:
        """`measure`, of the shipped weights or those in `folder`.

        Raises:
            FileProblem: The weights are missing.
        """
        return self.measure(self.load(folder), n, seed)

    def _need(self, n: int) -> None:
        if n < 0:
            raise OutOfRange("The number of prompts is negative.", given=n, do="Ask for n >= 0.")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, the rate as in `trainer.Run.rate`.

    Attributes:
        steps: Optimizer steps.
        lr: Peak learning rate.
        warmup: Steps until the peak.
        stretch: Length of the learning rate's cosine, as a multiple of all steps.
        cooldown: Fraction of all steps, the last ones, in which the rate also falls to 0 linearly.
        decay: Weight decay.
        betas: Of AdamW.
        keep: Steps whose weights are kept beside the final ones.
    """

    steps: int
    lr: float
    warmup: int = 100
    stretch: float = 5 / 3
    cooldown: float = 0.25
    decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    keep: tuple[int, ...] = ()


class Trained(Organism):
    """An organism with a recipe: what the trainer needs to know of it.

    Attributes:
        recipe: How it is trained.
    """

    recipe: Recipe

    @property
    def truth(self) -> Truth:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What was found inside when it was built, as its card has it."""
        return Truth(tuple(self.card.facts))

    @property
    def folder(self) -> Path:
        """As `Organism.folder`. Of some the package carries the card alone: they must be built."""
        carried = super().folder
        return self.built if self.built.is_dir() and not _weights(carried) else carried

    @abstractmethod
    def fresh(self) -> "nn.Module":
        """The module before training, in float32; draws from torch's global generator."""

    @abstractmethod
    def losses(self, module: "nn.Module", rng: Random, step: int, steps: int) -> "Iterator[Tensor]":
        """The parts of one step's loss, each made only when the last was carried backward.

        Args:
            module: In training mode.
            rng: Draws the step's examples.
            step: From 0.
            steps: Of the whole run, which may be shorter or longer than the recipe's.
        """

    def save(self, module: "nn.Module", folder: Path) -> None:
        """Write the weights and all else that `load` reads.

        By default a Hugging Face folder: float16 on disk, float32 when loaded.
        """
        import copy

        import torch

        half: Any = copy.deepcopy(module).half()
        half.save_pretrained(folder, state_dict=half.state_dict())
        for part in half.modules():
            if hasattr(part, "config"):
                part.config.dtype = torch.float32
        half.config.save_pretrained(folder)

    def load(
        self, folder: Path | None = None, *, step: int | None = None, **options: Any
    ) -> "Model":
        """As `Organism.load`, in float32 unless `dtype` says otherwise.

        Args:
            folder: As `Organism.load`.
            step: One of `checkpoints()`; None: the final weights.
            options: As `Organism.load`.
        """
        from underhood.core.loading import from_pretrained, no_bars

        where = folder or self.folder
        if not _weights(where):
            raise self.missing(where)
        name = self.name if step is None else f"{self.name}@{step}"
        options = {"dtype": "float32"} | options
        with no_bars():
            model = from_pretrained(str(where), label=name, **options)
        self.at_step(model.module, where, step)
        return model

    @abstractmethod
    def about(self, module: "nn.Module") -> dict[str, Any]:
        """The architecture in a few words and numbers, for the card."""

    def identity(self) -> str:
        """Two runs of one identity can go on from each other's checkpoints."""
        return repr((self.name, self.recipe))

    def establish(self, model: "Model") -> tuple[Fact, ...]:
        """What training made, by exact ablation against random controls; see `establish`."""
        return ()

    def build(self, out: Path | None = None, **options: Any) -> Card:
        """As `Organism.build`; a run that was stopped goes on."""
        from underhood.organisms.trainer import train

        return train(self, out=out or self.built, **options)

    def checkpoints(self, folder: Path | None = None) -> tuple[int, ...]:
        """Steps of the training run whose weights are kept; `load(step=...)` takes one of them."""
        files = ((folder or self.folder) / STEPS).glob("*.safetensors")
        return tuple(sorted(int(path.stem) for path in files))

    def at_step(self, module: "nn.Module", folder: Path, step: int | None) -> None:
        """Give a loaded module the weights that it had after so many steps; None: the final ones.

        Raises:
            OutOfRange: Weights of this step were not kept.
        """
        if step is None:
            return
        if step not in (known := self.checkpoints(folder)):
            raise OutOfRange(
                f"{self.name!r} has no weights of step {step}",
                given=step,
                do=f"use one of: {', '.join(map(str, known))}" if known else f"build {self.name}",
            )
        from safetensors.torch import load_file

        module.load_state_dict(load_file(folder / STEPS / f"{step}.safetensors"))

    def missing(self, folder: Path) -> FileProblem:
        """The error that says how to come by the weights."""
        return FileProblem(
            f"The weights of {self.name!r} are missing.",
            given=folder,
            do=f"Build it: `underhood organisms build {self.name}`.",
        )


def _weights(folder: Path) -> list[Path]:
    """The files of weights in a folder."""
    return list(folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Kind:
    """A task.

    Attributes:
        name: Identifier, as in `organism("town").pairs("capitals")`.
        summary: One line for humans, with an example.
    """

    name: str
    summary: str


K = TypeVar("K", bound=Kind)


class Drawn(Trained, Generic[K]):
    """A trained organism whose tasks draw cases of two splits.

    Attributes:
        kinds: The tasks.
    """

    kinds: tuple[K, ...]

    @property
    def tasks(self) -> Mapping[str, str]:
        """Name of each task, and one line about it."""
        return {kind.name: kind.summary for kind in self.kinds}

    def kind(self, task: str | None) -> K:
        """The task of this name.

        Raises:
            UsageError: No such task.
        """
        found = self.task(task)
        return next(kind for kind in self.kinds if kind.name == found)

    def drawing(self, task: str | None, n: int, seed: int, split: Split) -> tuple[K, Random]:
        """The task, and what its cases are drawn with: the same arguments, the same draws.

        Raises:
            OutOfRange: Fewer than none.
            UsageError: No such task or split.
        """
        self._need(n)
        if split not in ("train", "test"):
            raise UsageError("No such split.", given=split, do="Use 'train' or 'test'.")
        kind = self.kind(task)
        return kind, Random(f"{self.name}:{kind.name}:{split}:{seed}")


def held_out(key: str) -> bool:
    """Whether cases of this key are kept for testing. The same on every machine and version."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT == 0
