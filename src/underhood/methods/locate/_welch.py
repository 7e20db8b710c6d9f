"""Neurons that are more active in one ability: differences of mean activation, tested."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.model import Model
from underhood.core.site import Site
from underhood.data import EncodedPairs
from underhood.methods.locate._roles import Asked, blocks

__all__ = ["Active", "active", "compared"]


@dataclass(frozen=True, slots=True)
class Active:
    """Per neuron, first ability against second.

    Attributes:
        difference: Of mean activations.
        t: Welch's statistic.
        q: Its p-value after Benjamini and Hochberg over all neurons: the share of false finds
            among neurons with a q as small.
        by_chance: How many neurons a permutation of the labels finds on average.
    """

    difference: Float[Tensor, " cell"]
    t: Float[Tensor, " cell"]
    q: Float[Tensor, " cell"]
    by_chance: float


def active(
    model: Model, pairs: EncodedPairs, sites: list[Site], asked: Asked
) -> Float[Tensor, "batch cell"]:
    """Each clean prompt's activation of every neuron: at the last token, or the mean over tokens.

    The first token is left out of the mean.
    """
    found = []
    for rows in blocks(pairs, asked.batch_size):
        tokens = pairs.clean.rows(rows)
        if asked.positions == "last":
            run = model.run(tokens, record=sites, at=-1)
            found.append(torch.cat([run[site][:, 0].double().cpu() for site in sites], 1))
            continue
        run = model.run(tokens, record=sites)
        inside = torch.arange(tokens.ids.shape[1])[None] < torch.tensor(tokens.lengths)[:, None]
        inside[:, 0] &= torch.tensor(tokens.lengths) == 1
        weight = (inside / inside.sum(1, keepdim=True)).double()
        found.append(
            torch.cat(
                [torch.einsum("bpn,bp->bn", run.aligned(s).double().cpu(), weight) for s in sites],
                1,
            )
        )
    return torch.cat(found)


def compared(
    first: Float[Tensor, "a cell"],
    second: Float[Tensor, "b cell"],
    *,
    limit: float,
    times: int,
    seed: int,
) -> Active:
    """Welch's test of every neuron, false discoveries held, and the same for permuted labels."""
    t, q = _welch(first, second)
    rows, count = torch.cat([first, second]), len(first)
    make = torch.Generator().manual_seed(seed)
    chance = []
    for _ in range(times):
        order = torch.randperm(len(rows), generator=make)
        chance.append(int((_welch(rows[order[:count]], rows[order[count:]])[1] <= limit).sum()))
    return Active(first.mean(0) - second.mean(0), t, q, sum(chance) / max(times, 1))


def _welch(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    import warnings

    import numpy as np
    from scipy import stats

    with warnings.catch_warnings():
        # A neuron that never moves has no test; its NaN is answered below.
        warnings.simplefilter("ignore", RuntimeWarning)
        found: Any = stats.ttest_ind(first.numpy(), second.numpy(), equal_var=False)
    p = np.where(np.isfinite(found.pvalue), found.pvalue, 1.0)
    q = stats.false_discovery_control(p)
    return torch.from_numpy(np.nan_to_num(found.statistic)), torch.from_numpy(q)
