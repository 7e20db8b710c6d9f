"""How well scores find a known circuit.

    auroc       chance that a true edge outranks a false one (ties count half): the whole ranking
    auroc_mib   area under true against false positive rates at MIB's ten sizes, greedy selection,
                rates of false positives divided by their last, no point at the origin: coarse, and
                given for comparison with InterpBench's numbers only
    precision   share of true edges among as many best edges as there are true ones

Edges are ranked by the size of their score.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from underhood.circuits.circuit import Scores
from underhood.circuits.faithfulness import MIB_SIZES
from underhood.core.errors import UsageError

NOISE = 1e-6
"""Scores this small beside the largest are float noise, and count as ties at 0."""

__all__ = ["Recovery", "recovery"]


@dataclass(frozen=True, slots=True)
class Recovery:
    """How well a known circuit was found; all from 0 to 1.

    Attributes:
        auroc: Over the whole ranking; 0.5 is chance.
        auroc_mib: As InterpBench counts it.
        precision: Among as many edges as the truth has.
    """

    auroc: float
    auroc_mib: float
    precision: float


def recovery(scores: Scores, truth: Collection[str]) -> Recovery:
    """Compare scores with the true edges.

    Raises:
        UsageError: No true edges, or nothing but true edges.
        SiteNotFound: A true edge that the graph does not have.
    """
    real = scores.graph.real
    true = scores.graph.mask(list(truth))[real]
    if not 0 < int(true.sum()) < true.numel():
        raise UsageError(
            "a ranking is judged by true and by false edges",
            given=f"{int(true.sum())} true of {true.numel()}",
            do="give a truth that holds some of the edges",
        )
    size = scores.values.abs()[real].double()
    size = torch.where(size > NOISE * size.max(), size, 0.0)
    held = torch.where(scores.values.abs() > NOISE * size.max(), scores.values, 0.0)
    cleaned = Scores(scores.graph, held, scores.how)
    return Recovery(_auroc(size, true), _auroc_mib(cleaned, truth), _precision(size, true))


def _precision(size: Tensor, true: Tensor) -> float:
    """Among the k best; of edges tied at the border, the share that a fair draw would take."""
    k = int(true.sum())
    border = size.sort(descending=True).values[k - 1]
    above, tied = size > border, size == border
    share = (k - int(above.sum())) / int(tied.sum())
    return float((true & above).sum() + share * (true & tied).sum()) / k


def _auroc(size: Tensor, true: Tensor) -> float:
    """Mann-Whitney: pairs won, ties half."""
    ordered, order = size.sort()
    low = torch.searchsorted(ordered, ordered, right=False).double()
    high = torch.searchsorted(ordered, ordered, right=True).double()
    rank = torch.empty_like(size)
    rank[order] = (low + high + 1) / 2
    n, m = int(true.sum()), int((~true).sum())
    return float((rank[true].sum() - n * (n + 1) / 2) / (n * m))


def _auroc_mib(scores: Scores, truth: Collection[str]) -> float:
    true = scores.graph.mask(list(truth))
    x, y = [], []
    for share in MIB_SIZES:
        count = -int(-share * scores.graph.n_edges // 1)  # the code counts down past zero: up
        found = scores.greedy(count).mask
        y.append(float((found & true).sum() / true.sum()))
        x.append(float((found & ~true).sum() / (scores.graph.real & ~true).sum()))
    if not x[-1]:
        return 0.0
    return float(torch.trapezoid(torch.tensor(y), torch.tensor(x) / x[-1]))
