"""Attention knocked out: from some tokens to another, in a few neighbouring layers at a time."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.errors import OutOfRange
from underhood.core.model import Model
from underhood.core.ops import attend
from underhood.core.site import Site
from underhood.core.sweep import sweep
from underhood.core.tokens import Where
from underhood.data import EncodedPairs, Metric, normalised
from underhood.methods.locate._flow import last_logits
from underhood.methods.locate._grids import effects

if TYPE_CHECKING:
    import xarray

__all__ = ["Windows", "windows"]

Cut = tuple[int, int, frozenset[int]]
"""First layer of a window, target position, blocked positions."""


@dataclass(frozen=True, slots=True)
class Windows:
    """What is asked of the windows.

    Attributes:
        width: Layers in a window.
        targets: Target positions.
        groups: Source positions by name.
        sink: Whether the first token is the same everywhere, and not to be drawn as a control.
        metric: What is measured.
        draws: Random groups of equal size per cell.
        seed: Of these.
        batch_size: Rows of one pass.
    """

    width: int
    targets: tuple[int, ...]
    groups: dict[str, tuple[int, ...]]
    sink: bool
    metric: Metric
    draws: int
    seed: int
    batch_size: int | None


def windows(
    model: Model, encoded: EncodedPairs, asked: Windows
) -> tuple["xarray.Dataset", str, int]:
    """Every window, target and group; the numbers, how they were run, and passes.

    Raises:
        OutOfRange: The window is wider than the model is deep.
        NotOffered: The model has no attention scores.
    """
    model.resolve(Site("scores", stack=model.main))
    if not 1 <= asked.width <= model.n_layers:
        raise OutOfRange(
            "a window has as many layers as the model at most",
            given=f"width={asked.width}, {model.n_layers} layers",
            do=f"use 1 to {model.n_layers}",
        )
    starts = range(model.n_layers - asked.width + 1)
    real = [
        (start, target, frozenset(p for p in group if p < target))
        for start in starts for target in asked.targets for group in asked.groups.values()
    ]  # fmt: skip
    others = [_others(cut, asked) for cut in real]
    todo = [cut for cut in (*real, *(c for some in others for c in some)) if cut[2]]
    todo = [cut for cut in dict.fromkeys(todo) if _layers(model, cut, asked)]
    answers = encoded.answers, encoded.wrong
    reference = last_logits(model, encoded.clean, asked.batch_size)
    contrast_logits = last_logits(model, encoded.contrast, asked.batch_size)

    def read(logits: Tensor) -> Tensor:
        times = len(logits) // len(encoded)
        known = reference.repeat(times, 1) if asked.metric.uses_reference else None
        right, wrong = (x.repeat(times, 1) for x in answers)
        return asked.metric(logits, right, wrong, reference=known).double().cpu()

    clean, contrast = read(reference), read(contrast_logits)
    normalised(0.0, float(clean.mean()), float(contrast.mean()))  # refuses a flat metric
    plans = [_plan(model, cut, asked) for cut in todo]
    how, passes = "nothing to run", 0
    found: dict[Cut, Tensor] = {}
    if plans:
        swept = sweep(model, encoded.clean, plans, read, batch_size=asked.batch_size)
        found = dict(zip(todo, swept.values, strict=True))
        how, passes = swept.how, swept.passes
    values = torch.stack([found.get(cut, clean) for cut in real])
    control = [torch.stack([found.get(c, clean) for c in some]) for some in others if some]
    drawn = torch.tensor([bool(some) for some in others])
    means = torch.full_like(values, torch.nan)
    if control:
        means[drawn] = torch.stack([draws.mean(0) for draws in control])
    run = torch.tensor([cut in found for cut in real])
    data = _dataset(_Numbers(values, means, run, clean, contrast), asked, list(starts))
    return data, how, passes


def _others(cut: Cut, asked: Windows) -> list[Cut]:
    """The same window and target, other tokens: as many, drawn from the rest that it sees."""
    start, target, blocked = cut
    rest = [p for p in range(int(asked.sink), target) if p not in blocked]
    if not blocked or len(rest) < len(blocked):
        return []
    found = []
    for draw in range(asked.draws):
        rng = random.Random(hash((asked.seed, draw, start, target, *sorted(blocked))))
        found.append((start, target, frozenset(rng.sample(rest, len(blocked)))))
    return found


def _layers(model: Model, cut: Cut, asked: Windows) -> list[Site]:
    """Layers of a window that have attention scores."""
    sites = [Site("scores", cut[0] + i, stack=model.main) for i in range(asked.width)]
    return [site for site in sites if model.offers(site)]


def _plan(model: Model, cut: Cut, asked: Windows) -> Plan:
    op = attend(block=tuple(sorted(cut[2])))
    return Plan([Edit(site, op, Where(cut[1])) for site in _layers(model, cut, asked)])


@dataclass(frozen=True, slots=True)
class _Numbers:
    values: Float[Tensor, "cell batch"]
    control: Float[Tensor, "cell batch"]
    run: Tensor
    clean: Float[Tensor, " batch"]
    contrast: Float[Tensor, " batch"]


def _dataset(found: _Numbers, asked: Windows, starts: Sequence[int]) -> "xarray.Dataset":
    import xarray

    shape = (len(starts), len(asked.targets), len(asked.groups))
    dims = ("layer", "query", "key")
    effect, sem = effects(found.values, found.clean, found.contrast)
    chance, _ = effects(found.control, found.clean, found.contrast)
    columns = {
        "effect": effect, "sem": sem, "raw": (found.clean - found.values).mean(1) + 0.0,
        "skipped": ~found.run,
    }  # fmt: skip
    if asked.draws:
        columns["control"] = chance
    variables = {name: (dims, c.reshape(shape).numpy()) for name, c in columns.items()}
    blocked = found.values.reshape(*shape, -1).numpy()
    return xarray.Dataset(
        {
            **variables, "blocked": ((*dims, "batch"), blocked),
            "clean": ("batch", found.clean.numpy()),
            "contrast": ("batch", found.contrast.numpy()),
        },
        coords={
            "layer": list(starts), "query": list(asked.targets), "key": list(asked.groups),
            "last": ("layer", [start + asked.width - 1 for start in starts]),
        },
        attrs={"unit": asked.metric.unit, "metric": asked.metric.name, "width": asked.width},
    )  # fmt: skip
