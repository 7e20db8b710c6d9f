"""What two circuits of one graph have in common: edges, nodes, heads, and how much chance gives."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.circuits.circuit import Circuit, Scores

__all__ = ["PARTS", "Shared", "correlation", "held", "iou", "permuted", "shared"]

PARTS = ("edges", "nodes", "heads")
"""What is compared; nodes and heads without the input, which every circuit has."""


def held(circuit: Circuit, part: str) -> Bool[Tensor, " item"]:
    """Which edges, nodes or heads a circuit has, among all of its graph."""
    graph = circuit.graph
    if part == "edges":
        return circuit.mask[graph.real]
    names = set(circuit.nodes)
    wanted = [
        n for i, w in enumerate(graph.writers) for n in graph.written(i)
        if w.kind == "heads" or (part == "nodes" and w.kind != "input")
    ]  # fmt: skip
    return torch.tensor([graph.sources[n] in names for n in wanted], dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Shared:
    """Two sets of parts.

    Attributes:
        sizes: Of both.
        both: How many they share.
        total: How many there are in all.
        p: Chance that two sets of these sizes, drawn from all, share as many or more.
    """

    sizes: tuple[int, int]
    both: int
    total: int
    p: float

    @property
    def iou(self) -> float:
        """Shared, of those in either; NaN for two empty sets."""
        either = sum(self.sizes) - self.both
        return self.both / either if either else float("nan")

    @property
    def smaller(self) -> float:
        """Shared, of the smaller set."""
        return self.both / min(self.sizes) if min(self.sizes) else float("nan")

    @property
    def recall(self) -> tuple[float, float]:
        """Of each set the share that the other holds."""
        one, other = (self.both / n if n else float("nan") for n in self.sizes)
        return one, other


def shared(one: Circuit, other: Circuit, part: str) -> Shared:
    """What two circuits share, with its hypergeometric p."""
    from scipy.stats import hypergeom

    a, b = held(one, part), held(other, part)
    sizes, both, total = (int(a.sum()), int(b.sum())), int((a & b).sum()), len(a)
    p = float(hypergeom.sf(both - 1, total, sizes[0], sizes[1])) if total else float("nan")
    return Shared(sizes, both, total, min(p, 1.0))


def iou(one: Circuit, other: Circuit) -> Float[Tensor, " part"]:
    """Shared, of those in either, for each of `PARTS`."""
    both = [(held(one, part), held(other, part)) for part in PARTS]
    found = [float((a & b).sum()) / max(int((a | b).sum()), 1) for a, b in both]
    return torch.tensor(found, dtype=torch.float64)


def correlation(one: Scores, other: Scores) -> tuple[float, float]:
    """Pearson's r of the edges' scores, and Spearman's of their sizes; NaN where all are equal."""
    a, b = (s.values[s.graph.real].double() for s in (one, other))
    return _pearson(a, b), _pearson(_ranks(a.abs()), _ranks(b.abs()))


def permuted(one: Scores, other: Scores, *, times: int, seed: int) -> float:
    """Size of Pearson's r that one in twenty permutations of the edges reaches."""
    a, b = (s.values[s.graph.real].double() for s in (one, other))
    make = torch.Generator().manual_seed(seed)
    drawn = [abs(_pearson(a, b[torch.randperm(len(b), generator=make)])) for _ in range(times)]
    return float(torch.tensor(drawn, dtype=torch.float64).nan_to_num().quantile(0.95))


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else float("nan")


def _ranks(values: Tensor) -> Tensor:
    """Ranks; ties get their mean."""
    ordered = values.sort().values
    low = torch.searchsorted(ordered, values, right=False).double()
    return (low + torch.searchsorted(ordered, values, right=True).double()) / 2
