"""Masks by one trainer: which parts can be cut, found by gradient descent on all of them at once.

Every part (an edge, a node, a head, a weight) gets a number z between 0 (cut) and 1 (kept); what is
minimised is a loss of the masked model and a price for what is kept:

    loss(z) + lam * (share kept)                         or, towards a given sparsity t,
    loss(z) + l1 (s - t) + l2 (s - t)^2,                 s = 1 - share kept, l1 and l2 ascending

    hard-concrete   z = clamp(1.2 sigma((logit u + a) / (2/3)) - 0.1), u random: often just 0 or 1
    sigmoid         z = sigma(tau a), tau rising: soft at first, hard in the end
    clamped         z = w, put back into 0..1 after every step
    uniform         z is uniform the more often the less is decided, else 0 or 1, sigma(a) on
                    average: its gradient is an unbiased estimate of what cutting the part costs

It knows nothing of models: what is masked is any differentiable function of z.

Sources: subnetwork probing (Cao et al., 2021), DCM (Davies et al., 2023), Edge Pruning (Bhaskar et
al., 2024), UGS (Li and Janson, 2024), continuous sparsification (Savarese et al., 2020).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.errors import NotFinite, OutOfRange, ShapeMismatch, UsageError

__all__ = ["KINDS", "Recipe", "Trained", "odds_from_scores", "train_masks"]

KINDS = ("hard-concrete", "sigmoid", "clamped", "uniform")

LOW, HIGH, SOFT = -0.1, 1.1, 2 / 3  # limits and temperature of the hard concrete distribution
LIMITS = (-10.0, 5.0)  # of log-odds: above, a draw is the same, and the way back is long
STIFF = 10.0  # l2 at the start: a sparsity that is only integrated (l1) is overshot and oscillates
NEAR = 0.02  # of the sparsity asked for
CLEAR = 0.1  # a mask value this far from both ends is undecided
START = {"hard-concrete": 0.9, "sigmoid": 0.5, "clamped": 1.0, "uniform": 0.9}
RATE = {"hard-concrete": 0.2, "sigmoid": 0.1, "clamped": 0.05, "uniform": 0.2}

Objective = Callable[[Tensor, Sequence[int]], Tensor]
"""Mask values (`[part]`, or `[row part]` where each row has its own) and row numbers -> loss."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How masks are trained.

    Attributes:
        kind: One of `KINDS`.
        lam: Price of keeping everything, in the loss's unit (each part costs lam / parts).
        sparsity: Share of parts to cut; given, `lam` is not used. May exceed 1 (the pull stays).
        steps: Optimiser steps at most.
        lr: Adam's rate; default by kind.
        batch: Rows of a step.
        ramp: Share of the steps over which the sparsity asked for rises.
        hottest: For "sigmoid", tau at the last step (1 at the first, geometric).
        start: Share kept at the start (default by kind: 0.9; sigmoid 0.5; clamped 1).
        settled: Stop after the ramp when the undecided parts are fewer than this share of the kept
            ones; 0: never.
        restarts: Runs with other seeds; the best one is kept.
        seed: Of the draws and the order of rows.

    Raises:
        UsageError: An unknown kind.
        OutOfRange: Numbers outside their ranges.
    """

    kind: str = "hard-concrete"
    lam: float = 1.0
    sparsity: float | None = None
    steps: int = 200
    lr: float | None = None
    batch: int = 16
    ramp: float = 0.8
    hottest: float = 200.0
    start: float | None = None
    settled: float = 0.01
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError("no such mask", given=self.kind, do=f"use {', '.join(KINDS)}")
        start, sparsity = self.first, self.sparsity
        good = {
            "lam": (self.lam >= 0, "0 or more"),
            "steps": (self.steps >= 1, "1 or more"),
            "batch": (self.batch >= 1, "1 or more"),
            "lr": (self.rate > 0, "a number above 0"),
            "ramp": (0 < self.ramp <= 1, "a number above 0, up to 1"),
            "hottest": (self.hottest >= 1, "1 or more"),
            "start": (0 <= start <= 1, "0 to 1"),
            "settled": (0 <= self.settled < 1, "0 to below 1"),
            "restarts": (self.restarts >= 1, "1 or more"),
            "sparsity": (sparsity is None or 0 <= sparsity < 2, "0 to below 2"),
        }
        for name, (fine, range_) in good.items():
            if not fine:
                raise OutOfRange(
                    f"masks cannot be trained with this {name}",
                    given=f"{name}={getattr(self, name)}",
                    do=f"use {range_}",
                )

    @property
    def first(self) -> float:
        """Share kept at the start."""
        return START[self.kind] if self.start is None else self.start

    @property
    def rate(self) -> float:
        """Adam's rate."""
        return RATE[self.kind] if self.lr is None else self.lr


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained mask.

    Attributes:
        values: The mask without noise, 0 to 1.
        rank: What the parts are ordered by, best highest: the log-odds of being kept.
        kept: Which parts stay. Those with a value above one half; where a sparsity was asked for,
            as many of the best as it leaves (beyond 1: as many as the values sum up to).
        loss: The loss with exactly those parts, over all rows.
        history: By step: `loss` (of the step's draw), `share` (kept, as it is priced), `undecided`
            (share of all parts) and, towards a sparsity, `asked`.
        steps: Steps that were made.
        restart: Which of the restarts it is.
    """

    values: Float[Tensor, " part"]
    rank: Float[Tensor, " part"]
    kept: Bool[Tensor, " part"]
    loss: float
    history: dict[str, list[float]]
    steps: int
    restart: int = 0


class _Mask:
    """The trained numbers of one mask, and what they mean for its kind."""

    def __init__(self, recipe: Recipe, odds: Tensor) -> None:
        self.recipe, self.kind, self.heat = recipe, recipe.kind, 1.0
        first = torch.sigmoid(odds) if self.kind == "clamped" else odds
        self.own = first.detach().clone().requires_grad_()

    def draw(self, rows: int | None, make: torch.Generator) -> Tensor:
        """Values of one step: `[part]`, or one draw for each row."""
        if self.kind in ("sigmoid", "clamped"):
            return self.price() if rows is None else self.price().expand(rows, -1)
        shape = self.own.shape if rows is None else (rows, *self.own.shape)
        chance = torch.rand(shape, generator=make).to(self.own.device)
        if self.kind == "hard-concrete":
            soft = torch.sigmoid((torch.logit(chance, eps=1e-6) + self.own) / SOFT)
            return (soft * (HIGH - LOW) + LOW).clamp(0, 1)
        # Uniform for undecided parts, else 0 or 1, whichever is nearer: on average it is `share`.
        share = torch.sigmoid(self.own)
        often = 2 * torch.minimum(share, 1 - share).detach()
        other = torch.rand(shape, generator=make).to(self.own.device)
        value = torch.where(other < often, chance, (share > 0.5).to(share.dtype))
        # d E[loss] / d share is the mean of d loss / dz over uniform z, seen as often as drawn.
        return value + (share - share.detach()) * (other < often) / often

    def price(self) -> Tensor:
        """How far each part is kept, as it is priced: its expected or present value."""
        if self.kind == "hard-concrete":
            return torch.sigmoid(self.own - SOFT * math.log(-LOW / HIGH))
        if self.kind == "clamped":
            return self.own.clamp(0, 1)
        return torch.sigmoid(self.heat * self.own)

    @torch.no_grad()
    def settle(self, progress: float) -> None:
        """What happens between two steps."""
        if self.kind == "clamped":
            self.own.clamp_(0, 1)
        else:
            self.own.clamp_(*LIMITS)
        if self.kind == "sigmoid":
            self.heat = self.recipe.hottest**progress

    @torch.no_grad()
    def values(self) -> Tensor:
        """Without noise."""
        if self.kind == "hard-concrete":
            return torch.sigmoid(0.8 / SOFT * self.own)  # 0.8: as Edge Pruning has it
        return self.price()

    def rank(self) -> Tensor:
        """Log-odds of being kept."""
        own = self.own.detach()
        return torch.logit(own, eps=1e-6) if self.kind == "clamped" else own.clone()

    def kept(self) -> Tensor:
        """Which parts stay."""
        values, sparsity = self.values(), self.recipe.sparsity
        if sparsity is None:
            return values > 0.5
        count = round(len(values) * (1 - sparsity)) if sparsity <= 1 else round(float(values.sum()))
        kept = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        kept[self.rank().argsort(descending=True, stable=True)[:count]] = True
        return kept


def train_masks(
    objective: Objective,
    parts: int,
    rows: int,
    recipe: Recipe,
    *,
    odds: Float[Tensor, " part"] | None = None,
    per_row: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """A mask that keeps a loss low with few parts.

    Args:
        objective: The loss of mask values on some rows; differentiable in the values.
        parts: How many values.
        rows: How many rows there are to learn from.
        recipe: How.
        odds: Log-odds of each part to be kept at the start (`odds_from_scores`); default all alike.
        per_row: Give each row of a step its own draw: less noise for the same cost.
        device: Where the objective wants the values.
        progress: Called with the steps done and the steps in all.

    Raises:
        ShapeMismatch: `odds` of another length.
        NotFinite: A loss that is not a number.

    Cost: `restarts * steps` times the objective and its gradient, and once over all rows.
    """
    if odds is not None and odds.shape != (parts,):
        raise ShapeMismatch(
            "the start does not fit the mask",
            given=f"{list(odds.shape)} for {parts} parts",
            do="give one number for each part",
        )
    share = min(max(recipe.first, 1e-4), 1 - 1e-6)
    first = torch.full((parts,), math.log(share / (1 - share))) if odds is None else odds.float()
    best: Trained | None = None
    for restart in range(recipe.restarts):
        total = recipe.restarts * recipe.steps
        done = restart * recipe.steps

        def tick(step: int, done: int = done, total: int = total) -> None:
            if progress is not None:
                progress(done + step, total)

        mask = _Mask(recipe, first.to(device))
        history = _descend(objective, mask, rows, restart, per_row, tick)
        found = _finished(objective, mask, rows, history, restart)
        if best is None or _worth(found, recipe) < _worth(best, recipe):
            best = found
    assert best is not None
    return best


def _worth(found: Trained, recipe: Recipe) -> float:
    price = 0.0 if recipe.sparsity is not None else recipe.lam * float(found.kept.float().mean())
    return found.loss + price


def _descend(
    objective: Objective,
    mask: _Mask,
    rows: int,
    restart: int,
    per_row: bool,
    tick: Callable[[int], None],
) -> dict[str, list[float]]:
    recipe = mask.recipe
    make = torch.Generator().manual_seed(recipe.seed + 1000 * restart)
    pull = torch.tensor([0.0, STIFF], device=mask.own.device, requires_grad=True)
    adam = torch.optim.Adam([mask.own, pull], lr=recipe.rate, betas=(0.9, 0.95))
    history: dict[str, list[float]] = {"loss": [], "share": [], "undecided": []}
    before = 1 - float(mask.price().mean().detach())
    queue: list[int] = []
    for step in range(recipe.steps):
        mask.settle(step / max(recipe.steps - 1, 1))
        while len(queue) < min(recipe.batch, rows):
            queue += torch.randperm(rows, generator=make).tolist()
        index, queue = queue[: recipe.batch], queue[recipe.batch :]
        loss = objective(mask.draw(len(index) if per_row else None, make), index)
        share = mask.price().mean()
        price, missed = recipe.lam * share, 0.0
        if recipe.sparsity is not None:
            way = min(1.0, (step + 1) / (recipe.ramp * recipe.steps))
            asked = before + (recipe.sparsity - before) * way
            gap = 1 - share - asked
            price = pull[0] * gap + pull[1] * gap**2
            history.setdefault("asked", []).append(asked)
            missed = abs(float(gap.detach()))
        _check(float(loss.detach()), step)
        # The multipliers climb: they grow while the sparsity is missed.
        grads = torch.autograd.grad(loss + price, [mask.own, pull], allow_unused=True)
        mask.own.grad = grads[0]
        pull.grad = None if grads[1] is None else -grads[1]
        adam.step()
        undecided = _undecided(mask)
        history["loss"].append(float(loss.detach()))
        history["share"].append(float(share.detach()))
        history["undecided"].append(undecided)
        tick(step + 1)
        kept = float((mask.values() > 0.5).float().mean())
        late = step + 1 >= recipe.ramp * recipe.steps and missed < NEAR
        if late and undecided < recipe.settled * kept:
            break
    mask.settle(1.0)
    return history


def _undecided(mask: _Mask) -> float:
    values = mask.values()
    return float(((values > CLEAR) & (values < 1 - CLEAR)).float().mean())


def _check(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NotFinite(
            "the loss of the mask is not a number",
            given=f"step {step}",
            do="use a smaller learning rate, another loss, or float32",
        )


def _finished(
    objective: Objective, mask: _Mask, rows: int, history: dict[str, list[float]], restart: int
) -> Trained:
    kept, size = mask.kept(), mask.recipe.batch
    loss = 0.0
    with torch.no_grad():
        for first in range(0, rows, size):
            index = range(first, min(first + size, rows))
            loss += float(objective(kept.to(mask.own.dtype), index)) * len(index) / rows
    ends = (mask.values().cpu(), mask.rank().cpu(), kept.cpu())
    return Trained(*ends, loss, history, len(history["loss"]), restart)


def odds_from_scores(
    size: Float[Tensor, " part"], share: float, *, limit: float = 3.0
) -> Float[Tensor, " part"]:
    """Log-odds to start from: `log(size / cutoff)`, the cutoff being such that `share` lies above.

    Args:
        size: How much each part matters, as a size (not signed).
        share: Share of the parts that start more kept than cut.
        limit: Largest odds, so that training can still turn every part.
    """
    if not 0 < share < 1:
        raise OutOfRange("a share lies between 0 and 1", given=share, do="use 0.1 to 0.5")
    size = size.detach().float().cpu()
    cutoff = torch.quantile(size, 1 - share).clamp(min=1e-30)
    return (size.clamp(min=1e-30) / cutoff).log().clamp(-limit, limit)
