"""Verification of estimates: the exact effect of some cells beside what was estimated for them.

An estimate of a thousand effects from one backward pass is a claim; this is its control. Exact
patching runs the `k` cells with the largest estimates and a random sample of the others (the tail):

    agreement     Pearson and Spearman between estimate and exact, on the top, on the tail, and for
                  all cells (the tail's cells count for all that they were drawn from)
    chance        95th percentile of |Pearson| when the estimates are permuted among the cells
    recall        which share of the truly strongest k cells is among the k estimated ones
    missed        an upper bound on the effect of any cell that was not run (`missed_effect_bound`)

It knows nothing of models: `exact` is any function from sets of cells to effects.

    >>> truth = torch.tensor([3.0, -2.0, 0.5, 0.1, 0.0])
    >>> def exact(sets):
    ...     return torch.stack([truth[list(cells)].sum() for cells in sets])
    >>> found = verify(truth * 0.9, exact, k=2, tail=3)
    >>> round(found.all.pearson, 3), found.recall
    (1.0, 1.0)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.core.errors import NotFinite, OutOfRange, UsageError
from underhood.methods.locate._missed import Exact, Missed, missed_effect_bound, run_sets
from underhood.view import View, group, sentences, table

__all__ = ["Agreement", "Exact", "Missed", "Verified", "missed_effect_bound", "verify"]

_SHOWN = 12
_PERMUTATIONS = 1000


class Agreement(NamedTuple):
    """How well estimates and exact effects agree; NaN where one of them does not vary.

    `cells` is how many were run.
    """

    pearson: float
    spearman: float
    cells: int


@dataclass(frozen=True, slots=True)
class Verified:
    """What verification found.

    Attributes:
        cells: Numbers of the cells that were run: the top (strongest first), then the tail.
        estimate: Their estimates.
        exact: Their exact effects.
        is_top: Which of them belong to the top.
        total: Cells that could have been run.
        top: Agreement on the top.
        tail: Agreement on the tail.
        all: Agreement on all cells, each cell of the tail weighted by what it stands for.
        chance: 95th percentile of |Pearson| with permuted estimates, over the cells run.
        recall: Share of the strongest cells that are in the top (weighted likewise).
        missed: The bound on missed effects, if it was asked for and some cells were not run.
        unsigned: Whether the estimates have no sign, so that exact effects count by size.
    """

    cells: Int[Tensor, " run"]
    estimate: Float[Tensor, " run"]
    exact: Float[Tensor, " run"]
    is_top: Bool[Tensor, " run"]
    total: int
    top: Agreement
    tail: Agreement
    all: Agreement
    chance: float
    recall: float
    missed: Missed | None
    unsigned: bool

    def scattered(self, size: int) -> tuple[Float[Tensor, " cell"], Int[Tensor, " cell"]]:
        """Over all `size` cells: exact effects (NaN where not run), and 0 not run, 1 top, 2 tail.

        For a result's variables `exact` and `verified`.
        """
        exact = torch.full((size,), torch.nan, dtype=torch.float64)
        part = torch.zeros(size, dtype=torch.int64)
        exact[self.cells] = self.exact.double()
        part[self.cells] = torch.where(self.is_top, 1, 2)
        return exact, part

    def scalars(self) -> dict[str, float]:
        """The numbers of a result that have no axes."""
        found = {}
        for name in ("top", "tail", "all"):
            part: Agreement = getattr(self, name)
            found |= {f"pearson_{name}": part.pearson, f"spearman_{name}": part.spearman}
        found |= {"pearson_chance": self.chance, "recall": self.recall}
        found["missed_bound"] = math.nan if self.missed is None else self.missed.bound
        found["missed_p"] = math.nan if self.missed is None else self.missed.p_value
        return found

    def statements(self, unit: str = "") -> list[str]:
        """Plain sentences with the numbers in them."""
        tops, tails = int(self.is_top.sum()), int((~self.is_top).sum())
        run = f"the {tops} strongest of {self.total} cells"
        run += f" and {tails} random others" if tails else ""
        found = [
            f"Checked by exact patching of {run}: correlation with the estimates"
            f" {_r(self.all.pearson)} over all cells"
            f" ({_r(self.top.pearson)} on the strongest, {_r(self.tail.pearson)} on the others;"
            f" permuted estimates reach {_r(self.chance)})."
        ]
        if math.isfinite(self.recall):
            about = "" if len(self.cells) == self.total else " (estimated from the sample)"
            found.append(
                f"Of the {tops} truly strongest cells {self.recall:.0%} are among the {tops}"
                f" that the estimate names{about}."
            )
        if self.missed is not None:
            missed = self.missed
            found.append(
                f"With {missed.confidence:.0%} confidence none of the {missed.cells} cells that"
                f" were not run has an effect above {missed.bound:.3g} {unit}".rstrip()
                + f" ({missed.subsets} random subsets patched)."
            )
            if missed.theta is not None:
                found.append(
                    f"That one of them reaches {missed.theta:g} {unit}".rstrip()
                    + f" has a p-value of {missed.p_value:.2g}."
                )
        return found

    def view(self, labels: Sequence[str], *, unit: str = "") -> View:
        """Sentences, and the cells that were run with both numbers.

        Args:
            labels: One per cell of the whole grid.
            unit: Of the effects.
        """
        order = [*range(int(self.is_top.sum()))][:_SHOWN]
        first = int(self.is_top.sum())
        order += [*range(first, len(self.cells))][:_SHOWN]
        rows = [
            [
                labels[int(self.cells[i])], float(self.estimate[i]), float(self.exact[i]),
                "strongest" if bool(self.is_top[i]) else "random other",
            ]
            for i in order
        ]  # fmt: skip
        number = {"unit": unit, "format": "+.3f"}
        columns = [
            {"name": "cell"}, {"name": "estimate", **number}, {"name": "exact", **number},
            {"name": "drawn as"},
        ]  # fmt: skip
        shown = "" if len(order) == len(self.cells) else f" ({len(order)} of {len(self.cells)})"
        parts = [
            sentences(self.statements(unit), title="How far the estimate can be trusted"),
            table(columns, rows, title=f"Estimate and exact effect{shown}"),
        ]
        return group(parts, title="Verified by exact patching", about=self._about())

    def _about(self) -> str:
        text = "The random others are the control: an estimate that only ranks its own favourites"
        text += " well fails there."
        if self.unsigned:
            text += " These estimates have no sign; exact effects are compared by size."
        return text


def verify(
    estimates: Float[Tensor, " cell"],
    exact: Exact,
    *,
    k: int = 20,
    tail: int = 20,
    seed: int = 0,
    ignore: Bool[Tensor, " cell"] | None = None,
    unsigned: bool = False,
    subsets: int = 0,
    share: float = 0.25,
    confidence: float = 0.95,
    theta: float | None = None,
) -> Verified:
    """Exact patching of the `k` cells with the largest estimates and of a random tail.

    Args:
        estimates: One per cell, in any unit.
        exact: The exact effects of sets of cells, in the same unit and sign.
        k: How many of the strongest to run (all of them, where there are fewer).
        tail: How many of the others.
        seed: Of the tail, the permutations and the subsets.
        ignore: Cells to leave out: known to do nothing, or absent.
        unsigned: The estimates are sizes (AtP*'s GradDrop): compare them with |exact|.
        subsets: Random subsets for `missed_effect_bound`; 0: no bound.
        share: Chance of each cell to be in a subset.
        confidence: Of the bound.
        theta: An effect to ask about: how likely is it that a cell which was not run reaches it?

    Returns:
        See `Verified`; correlations are NaN where the numbers do not vary.

    Raises:
        NotFinite: Estimates or exact effects that are not numbers.
        OutOfRange: Nothing to run, or numbers out of their range.

    Cost: k + tail exact cells, and `subsets` joint ones.

    Source: verification and diagnostic after Kramár et al. 2024, "AtP*". Ours: the weights that
        make the sample stand for all cells, the permuted control, and the form of the bound.
    """
    chosen = torch.ones(len(estimates), dtype=torch.bool) if ignore is None else ~ignore.cpu()
    numbers = chosen.nonzero()[:, 0]
    _check(estimates, numbers, k, tail)
    size = estimates.detach().double().cpu()
    order = numbers[size[numbers].abs().argsort(descending=True, stable=True)]
    tops, rest = order[:k], order[k:]
    make = torch.Generator().manual_seed(seed)
    tails = rest[torch.randperm(len(rest), generator=make)[:tail]]
    cells = torch.cat([tops, tails])
    found = run_sets(exact, [[int(cell)] for cell in cells], "exact effects")
    truth = found.abs() if unsigned else found
    guess = size[cells]
    is_top = torch.arange(len(cells)) < len(tops)
    weight = torch.where(is_top, 1.0, len(rest) / max(len(tails), 1)).double()
    left = rest[~torch.isin(rest, tails)]
    missed = None
    if subsets and len(left):
        missed = missed_effect_bound(
            exact, left, subsets=subsets, share=share, confidence=confidence, theta=theta, seed=seed
        )
    return Verified(
        cells, guess, found, is_top, len(numbers),
        _agreement(guess[is_top], truth[is_top]),
        _agreement(guess[~is_top], truth[~is_top]),
        _agreement(guess, truth, weight),
        _chance(guess, truth, make), _recall(truth, is_top, weight), missed, unsigned,
    )  # fmt: skip


def _check(estimates: Tensor, numbers: Tensor, k: int, tail: int) -> None:
    if k < 1 or tail < 0:
        raise OutOfRange(
            "verification runs at least one of the strongest cells",
            given=f"k={k}, tail={tail}",
            do="k=20, tail=20",
        )
    if not len(numbers):
        raise UsageError(
            "there is no cell to verify",
            given=f"{len(estimates)} cells, all of them known to do nothing",
            do="check that the two prompts differ where the sites are",
        )
    bad = ~torch.isfinite(estimates.detach().cpu()[numbers])
    if bool(bad.any()):
        raise NotFinite(
            "some estimates are not numbers",
            given=f"{int(bad.sum())} of {len(numbers)}, the first is cell {int(numbers[bad][0])}",
            why="they can be neither ranked nor compared",
            do="try float32; look for activations that overflow",
        )


# Agreement ---------------------------------------------------------------------------------------


def _agreement(guess: Tensor, truth: Tensor, weight: Tensor | None = None) -> Agreement:
    weight = torch.ones_like(guess) if weight is None else weight
    ranked = _pearson(_ranks(guess, weight), _ranks(truth, weight), weight)
    return Agreement(_pearson(guess, truth, weight), ranked, len(guess))


def _pearson(a: Tensor, b: Tensor, weight: Tensor) -> float:
    """Weighted correlation; NaN for fewer than three values, or where one does not vary."""
    if len(a) < 3:
        return math.nan
    share = weight / weight.sum()
    a, b = (x - (share * x).sum() for x in (a, b))
    sizes = [(share * x * x).sum() for x in (a, b)]
    if min(float(s) for s in sizes) < 1e-30:
        return math.nan
    return float((share * a * b).sum() / (sizes[0] * sizes[1]).sqrt())


def _ranks(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mid-ranks: how much weight lies below, plus half of what is equal."""
    below = (values[None] < values[:, None]).double() @ weight
    equal = (values[None] == values[:, None]).double() @ weight
    return below + equal / 2


def _chance(guess: Tensor, truth: Tensor, make: torch.Generator) -> float:
    """95th percentile of |Pearson| when the estimates are permuted among the cells run."""
    even = torch.ones_like(guess)
    if math.isnan(_pearson(guess, truth, even)):
        return math.nan
    a, b = (x - x.mean() for x in (guess, truth))
    order = torch.rand(_PERMUTATIONS, len(a), generator=make).argsort(1)
    drawn = (a[order] @ b).abs() / (a.norm() * b.norm())
    return float(drawn.quantile(0.95))


def _recall(truth: Tensor, is_top: Tensor, weight: Tensor) -> float:
    """Share of the strongest cells (as many as the top holds) that are in the top.

    A cell of the tail stands for `weight` cells: sorted by size, cells are taken until so many
    have been counted, the last one in part. Exact when every cell was run.
    """
    k = float(is_top.sum())
    order = truth.abs().argsort(descending=True, stable=True)
    before = weight[order].cumsum(0) - weight[order]
    taken = (k - before).clamp(min=0).minimum(weight[order])
    return float((taken * is_top[order]).sum() / k)


def _r(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.2f}"
