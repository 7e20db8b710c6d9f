"""What may have been missed: a bound on the effects of cells that nobody ran.

Random subsets of those cells are patched, each as one. Were there a cell with a large effect, the
subsets that hold it would differ from those that do not. Welch's t per cell, and Bonferroni over
the cells, turn that into an upper bound; it knows nothing of models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.core.errors import NotFinite, OutOfRange, ShapeMismatch

__all__ = ["Exact", "Missed", "missed_effect_bound", "run_sets"]

Exact = Callable[[Sequence[Sequence[int]]], Tensor]
"""Effects of sets of cells, the cells of a set patched together: `exact([[3], [0, 7]])` gives two
numbers (means over rows), in the unit and with the sign of the estimates."""


@dataclass(frozen=True, slots=True)
class Missed:
    """What may have been missed among the cells that were not run.

    Attributes:
        bound: With `confidence`, no cell that was not run has a larger average marginal effect.
        confidence: Of the bound, for all those cells at once.
        subsets: How many random subsets were patched.
        share: Chance of each cell to be in a subset.
        cells: How many cells the bound is about.
        theta: The effect that was asked about, if any.
        p_value: Of the hypothesis that some cell reaches `theta`; NaN without one.
    """

    bound: float
    confidence: float
    subsets: int
    share: float
    cells: int
    theta: float | None = None
    p_value: float = math.nan


def missed_effect_bound(
    exact: Exact,
    cells: Int[Tensor, " left"] | Sequence[int],
    *,
    subsets: int = 64,
    share: float = 0.25,
    confidence: float = 0.95,
    theta: float | None = None,
    seed: int = 0,
) -> Missed:
    """An upper bound on the effect of any cell that was not run, from random joint patches.

    Each subset holds each cell by chance and is patched as one. For a cell the difference between
    the mean effect of the subsets with it and of those without it estimates its average marginal
    effect (its own effect, where effects add up); Welch's t gives each a one-sided bound, and
    Bonferroni makes it hold for all cells at once: a few dozen passes bound thousands of cells.

    Args:
        exact: The exact effects of sets of cells.
        cells: The cells that the bound is about.
        subsets: How many subsets; at least 8.
        share: Chance of each cell to be in a subset, between 0 and 1.
        confidence: Of the bound.
        theta: An effect to ask about; gives `p_value`.
        seed: Of the subsets.

    Raises:
        OutOfRange: Too few subsets, or a share or confidence outside (0, 1).
        NotFinite: Effects that are not numbers.

    Source: after the diagnostic of Kramár et al. 2024; adapted (per cell, with Bonferroni).

    Misleads: parts that back each other up change a subset's effect less, or more, than their own
        effects add up to: the bound is on the average marginal effect within random subsets.
    """
    numbers = torch.as_tensor(cells, dtype=torch.long)
    for name, value in (("share", share), ("confidence", confidence)):
        if not 0 < value < 1:
            raise OutOfRange(f"{name} lies between 0 and 1", given=value, do=f"{name}=0.5")
    if subsets < 8 or not len(numbers):
        raise OutOfRange(
            "a bound needs at least 8 subsets of one cell or more",
            given=f"{subsets} subsets, {len(numbers)} cells",
            do="subsets=64",
        )
    inside = _memberships(len(numbers), subsets, share, seed)
    effects = run_sets(exact, [numbers[row].tolist() for row in inside], "joint effects")
    gap, error, freedom = _welch(inside, effects)
    level = (1 - confidence) / (2 * len(numbers))
    bound = float((gap.abs() + error * _t_quantile(1 - level, freedom)).max())
    p_value = math.nan
    if theta is not None:
        each = _t_tail((theta - gap.abs()) / error.clamp(min=1e-30), freedom)
        p_value = min(1.0, float(each.max()) * 2 * len(numbers))
    return Missed(bound, confidence, subsets, share, len(numbers), theta, p_value)


def _memberships(cells: int, subsets: int, share: float, seed: int) -> Bool[Tensor, "subset cell"]:
    """Which cells each subset holds: each cell in the same number of subsets, by chance which."""
    make = torch.Generator().manual_seed(seed + 1)
    count = min(max(round(share * subsets), 4), subsets - 4)
    ranks = torch.rand(subsets, cells, generator=make).argsort(0).argsort(0)
    return ranks < count


def _welch(
    inside: Bool[Tensor, "subset cell"], effects: Float[Tensor, " subset"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Per cell: mean effect with it minus without it, its standard error, degrees of freedom."""
    parts = []
    for member in (inside, ~inside):
        n = member.sum(0).double()
        mean = (member * effects[:, None]).sum(0) / n
        spread = (member * (effects[:, None] - mean) ** 2).sum(0) / (n - 1)
        parts.append((mean, spread / n, n))
    (m1, v1, n1), (m0, v0, n0) = parts
    both = (v1 + v0).clamp(min=1e-60)
    freedom = both**2 / (v1**2 / (n1 - 1) + v0**2 / (n0 - 1)).clamp(min=1e-120)
    return m1 - m0, both.sqrt(), freedom.clamp(min=1.0)


def _t_quantile(level: float, freedom: Tensor) -> Tensor:
    from scipy.stats import t

    return torch.as_tensor(t.ppf(level, freedom.numpy()), dtype=torch.float64)


def _t_tail(value: Tensor, freedom: Tensor) -> Tensor:
    from scipy.stats import t

    return torch.as_tensor(t.sf(value.numpy(), freedom.numpy()), dtype=torch.float64)


def run_sets(exact: Exact, sets: Sequence[Sequence[int]], what: str) -> Float[Tensor, " set"]:
    """The effects of sets of cells in float64, checked; an empty set does nothing."""
    full = [number for number, cells in enumerate(sets) if cells]
    found = torch.zeros(len(sets), dtype=torch.float64)
    if not full:
        return found
    effects = exact([sets[number] for number in full]).detach().double().cpu()
    if effects.shape != (len(full),):
        raise ShapeMismatch(
            "the exact effects must be one number per set of cells",
            given=f"shape {list(effects.shape)} for {len(full)} sets",
            do="average over rows",
        )
    if not bool(torch.isfinite(effects).all()):
        raise NotFinite(
            f"some {what} are not numbers",
            given=f"{int((~torch.isfinite(effects)).sum())} of {len(full)}",
            do="check the cells and the precision",
        )
    found[full] = effects
    return found
