"""Organisms that name what is on a picture: image classifiers of transformers, trained here.

A task is a function that draws one `Case`; pictures, pairs and training batches are views of it.

Two measurements go beyond accuracy. Where another cue speaks for another class (a circle with the
texture of squares), `shape_share` is the share of answers for the label among answers for either:
the shape bias of Geirhos et al. (2019), arXiv 1811.12231. Where the task is attacked, pictures are
changed by at most `Attack.size` per pixel value to make the answer wrong: projected gradient
descent, Madry et al. (2018), arXiv 1706.06083.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from underhood.core.errors import UsageError
from underhood.organisms.base import PROMPTS, SEED, Drawn, Kind, Recipe, Split, held_out
from underhood.organisms.card import Fact
from underhood.organisms.sight.pictures import PicturePairs, Pictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from underhood.core.model import Model

__all__ = ["Attack", "Case", "Classifier", "Task", "View", "answers", "collect"]

# Pictures of one forward pass.
_BATCH = 250
# What pixels are taken to be before training: their mean and deviation.
_MIDDLE, _DEVIATION = 0.5, 0.2
# Draws that may miss the wanted split before we say that the task has no such cases.
_PATIENCE = 10_000


@runtime_checkable
class View(Protocol):
    """A picture that is drawn when it is needed."""

    @property
    def attributes(self) -> dict[str, Any]:
        """What is known of it, by name."""
        ...

    def draw(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels `[3, h, w]` from 0 to 1, and the mask `[h, w]` of what decides, if known."""
        ...


@dataclass(frozen=True)
class Case:
    """One drawn example of a task.

    Attributes:
        view: The picture.
        label: Its class.
        contrast: A picture of another class, like this one in all that does not decide.
        wrong: The class of the contrast.
        key: What is held out together, in all tasks; picture and contrast share it.
        rival: The class that another cue of both pictures speaks for, if one does.
    """

    view: View
    label: int
    contrast: View
    wrong: int
    key: str
    rival: int | None = None


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent within a box around each picture.

    Attributes:
        size: Greatest change of a pixel value, which goes from 0 to 1.
        steps: Gradient steps.
    """

    size: float
    steps: int

    def __call__(
        self, module: "nn.Module", pixels: "Tensor", labels: "Tensor", scale: float = 1.0
    ) -> "Tensor":
        """Pictures changed so that the module errs; starts at random, from torch's generator.

        Args:
            module: The classifier.
            pixels: `[n, 3, h, w]`.
            labels: `[n]`, the right classes.
            scale: Factor on `size`.

        Cost: one forward and backward pass per step.
        """
        import torch

        size = self.size * scale
        training = module.training
        # Batch norm must not learn from what the attack tries.
        module.eval()
        found = (pixels + size * (2 * torch.rand_like(pixels) - 1)).clamp(0, 1)
        for _ in range(self.steps):
            found.requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(module(pixel_values=found).logits, labels)
            (slope,) = torch.autograd.grad(loss, found)
            moved = found.detach() + 2.5 * size / self.steps * slope.sign()
            found = pixels + (moved - pixels).clamp(-size, size)
            found = found.clamp(0, 1)
        module.train(training)
        return found


@dataclass(frozen=True)
class Task(Kind):
    """One kind of picture.

    Attributes:
        draw: Draws one case of any split.
        attack: What `measure` does to the pictures first.
    """

    draw: Callable[[Random], Case]
    attack: Attack | None = None


@dataclass(frozen=True)
class Classifier(Drawn[Task]):
    """A small image classifier with known tasks.

    Attributes:
        name: As in `uh.load(name)`.
        summary: One line for humans.
        classes: Names of the classes.
        model_type: Of transformers: "resnet", "vit".
        sizes: Of the model, in the names of its transformers configuration.
        recipe: How it is trained.
        kinds: The tasks; the first is the one it is trained on.
        limits: Known weaknesses, for the card.
        batch: Pictures of a training step.
        attack: Training pictures are attacked first, ever more over the first half of training.
        findings: Establishes what training made; see `establish`.
    """

    name: str
    summary: str
    classes: tuple[str, ...]
    model_type: str
    sizes: Mapping[str, Any]
    recipe: Recipe
    kinds: tuple[Task, ...]
    limits: tuple[str, ...]
    batch: int = 64
    attack: Attack | None = None
    findings: "Callable[[Classifier, Model], tuple[Fact, ...]] | None" = None

    # Pictures ------------------------------------------------------------------------------------

    def cases(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> list[Case]:
        """Draw `n` cases of one split; the same arguments give the same cases.

        Raises:
            OutOfRange: Fewer than none.
            UsageError: No such task or split.
        """
        kind, rng = self.drawing(task, n, seed, split)
        return [_draw(kind, rng, split) for _ in range(n)]

    def prompts(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> Pictures:
        """Draw `n` pictures; see `cases`. `model.run(pictures.inputs)` reads them.

        Cost: half a millisecond a picture.
        """
        cases = self.cases(task, n, seed, split)
        rivals = [case.rival for case in cases]
        return collect([c.view for c in cases], [c.label for c in cases], self.classes, rivals)

    def pairs(
        self, task: str | None = None, n: int = 32, seed: int = 0, split: Split = "test"
    ) -> PicturePairs:
        """Draw `n` pictures, each with a contrast of another class; see `cases`."""
        cases = self.cases(task, n, seed, split)
        rivals = [case.rival for case in cases]
        return PicturePairs(
            collect([c.view for c in cases], [c.label for c in cases], self.classes, rivals),
            collect([c.contrast for c in cases], [c.wrong for c in cases], self.classes, rivals),
        )

    # Making --------------------------------------------------------------------------------------

    def fresh(self) -> "nn.Module":
        """As `Trained.fresh`."""
        from transformers import AutoConfig, AutoModelForImageClassification

        config = AutoConfig.for_model(
            self.model_type,
            id2label=dict(enumerate(self.classes)),
            label2id={name: i for i, name in enumerate(self.classes)},
            **self.sizes,
        )
        module = AutoModelForImageClassification.from_config(config)
        _centre(module)
        return module

    def losses(self, module: "nn.Module", rng: Random, step: int, steps: int) -> "Iterator[Tensor]":
        """The mean loss of naming the classes of one batch, in nats."""
        import torch

        drawn = [_draw(self.kinds[0], rng, "train") for _ in range(self.batch)]
        seen = collect([c.view for c in drawn], [c.label for c in drawn], self.classes)
        pixels = seen.pixels
        if self.attack is not None:
            # At full strength from the start nothing is learned.
            pixels = self.attack(module, pixels, seen.labels, min(1.0, 2 * step / steps))
        yield torch.nn.functional.cross_entropy(module(pixel_values=pixels).logits, seen.labels)

    def about(self, module: Any) -> dict[str, Any]:
        """The class and the sizes."""
        return {"class": type(module).__name__, "classes": list(self.classes)} | dict(self.sizes)

    def identity(self) -> str:
        """Whatever changes the pictures or the weights."""
        return repr((self.name, self.model_type, self.classes, dict(self.sizes), self.recipe,
                     self.kinds[0].name, self.batch, self.attack))  # fmt: skip

    def establish(self, model: "Model") -> tuple[Fact, ...]:
        """As `Trained.establish`, by `findings`."""
        return self.findings(self, model) if self.findings else ()

    # Measuring -----------------------------------------------------------------------------------

    def measure(self, model: "Model", n: int = PROMPTS, seed: int = SEED) -> dict[str, Any]:
        """Per task the held-out accuracy, and how the answers fall.

        `accuracy` of an attacked task is under attack, `noise_accuracy` under random changes of the
        same size. Of a task with rivals, `rival` is the share of answers for the rival's class.
        """
        out: dict[str, Any] = {}
        for kind in self.kinds:
            seen = self.prompts(kind.name, n, seed)
            module, labels = model.module, seen.labels
            pixels = seen.pixels
            found: dict[str, Any] = {}
            if kind.attack is not None:
                noisy, pixels = attacked(kind.attack, module, seen, seed)
                right = (answers(module, noisy) == labels).float().mean()
                found = {"noise_accuracy": round(right.item(), 4), "size": kind.attack.size}
            said = answers(module, pixels)
            right = (said == labels).float().mean().item() if n else 0.0
            if seen.rivals is not None:
                other = (said == seen.rivals).float().mean().item()
                share = right / (right + other) if right + other else 0.0
                found = {"shape_share": round(share, 4), "rival": round(other, 4)}
            out[kind.name] = {"accuracy": round(right, 4), "n": n} | found
        return out


def answers(module: "nn.Module", pixels: "Tensor") -> "Tensor":
    """The class that the module itself gives each picture, `[n]`."""
    import torch

    with torch.no_grad():
        parts = [module(pixel_values=some).logits.argmax(-1) for some in pixels.split(_BATCH)]
    return torch.cat(parts).cpu()


def attacked(
    attack: Attack, module: "nn.Module", seen: Pictures, seed: int
) -> "tuple[Tensor, Tensor]":
    """Pictures under random changes of the attack's size, and under the attack."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        signs = 2 * torch.randint(0, 2, seen.pixels.shape) - 1
        noisy = (seen.pixels + attack.size * signs).clamp(0, 1)
        batches = zip(seen.pixels.split(_BATCH), seen.labels.split(_BATCH), strict=True)
        worst = torch.cat([attack(module, pixels, labels) for pixels, labels in batches])
    return noisy, worst


def collect(
    views: list[Any],
    labels: list[int],
    classes: tuple[str, ...],
    rivals: list[int | None] | None = None,
) -> Pictures:
    """Draw views into one batch."""
    import torch

    drawn = [view.draw() for view in views]
    masks = [mask for _, mask in drawn if mask is not None]
    known = [rival for rival in rivals or () if rival is not None]
    names = views[0].attributes if views else ()
    return Pictures(
        pixels=torch.from_numpy(np.stack([pixels for pixels, _ in drawn]))
        if drawn
        else torch.empty(0, 3, 1, 1),
        labels=torch.tensor(labels, dtype=torch.long),
        classes=classes,
        masks=torch.from_numpy(np.stack(masks)) if masks else None,
        rivals=torch.tensor(known) if known else None,
        attributes={name: [view.attributes[name] for view in views] for name in names},
    )


def _centre(module: "nn.Module") -> None:
    """Let a first convolution with a bias begin as if pixels had mean 0 and deviation 1.

    Without, patches look alike to a transformer: their mean drowns all in which they differ.
    """
    import torch

    first = next(part for part in module.modules() if isinstance(part, torch.nn.Conv2d))
    if first.bias is not None:
        with torch.no_grad():
            first.weight /= _DEVIATION
            first.bias -= _MIDDLE * first.weight.sum((1, 2, 3))


def _draw(task: Task, rng: Random, split: Split) -> Case:
    """One case of the wanted split."""
    for _ in range(_PATIENCE):
        case = task.draw(rng)
        if held_out(case.key) == (split == "test"):
            return case
    raise UsageError("This task has no such cases.", given=split, do="Use the other split.")
