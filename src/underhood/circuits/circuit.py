"""A circuit: some of a graph's edges, and the ways to choose them by score.

Choosing the best n edges leaves edges that lead nowhere; `prune` takes away every node that lacks
incoming or outgoing edges, until none does (the input needs no incoming ones, the logits no
outgoing ones). All selections here follow MIB's rules, so that numbers can be compared.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.circuits.graph import Graph
from underhood.core.errors import NotFinite, OutOfRange, ShapeMismatch, UsageError

__all__ = ["Circuit", "Scores", "combine"]


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph.

    Attributes:
        graph: The graph.
        mask: Which edges belong to it.
        how: How it was made.
    """

    graph: Graph
    mask: Bool[Tensor, "source destination"]
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask.shape != self.graph.real.shape:
            raise ShapeMismatch(
                "the mask does not fit the graph",
                given=f"{list(self.mask.shape)} for {self.graph!r}",
                do="make it with graph.mask(edge names)",
            )
        object.__setattr__(self, "mask", self.mask & self.graph.real)

    @classmethod
    def of(cls, graph: Graph, edges: Sequence[str]) -> "Circuit":
        """The circuit of some edges, named as `a1.h0->a3.h5<k>`."""
        return cls(graph, graph.mask(edges))

    @classmethod
    def whole(cls, graph: Graph) -> "Circuit":
        """All edges."""
        return cls(graph, graph.real)

    @property
    def edges(self) -> list[str]:
        """Names of its edges."""
        return self.graph.names(self.mask)

    def __len__(self) -> int:
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Its share of the graph's edges."""
        return len(self) / max(self.graph.n_edges, 1)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that it passes through, the logits left out."""
        return [n for n, inside in zip(self.graph.sources, self._inside(), strict=True) if inside]

    def _inside(self) -> Bool[Tensor, " source"]:
        """Nodes with incoming and outgoing edges."""
        incoming = (self.graph.feeds.T.float() @ self.mask.any(0).float()) > 0
        incoming[0] = True
        return incoming & self.mask.any(1)

    def pruned(self) -> "Circuit":
        """Without nodes that lack incoming or outgoing edges, and without their edges."""
        mask = self.mask
        while True:
            inside = replace(self, mask=mask)._inside()
            reached = (self.graph.feeds.float() @ inside.float()) > 0
            reached[-1] = True  # the logits
            smaller = mask & inside[:, None] & reached[None]
            if bool((smaller == mask).all()):
                return replace(self, mask=mask)
            mask = smaller

    def complement(self) -> "Circuit":
        """All other edges."""
        return replace(self, mask=self.graph.real & ~self.mask)

    def without(self, node: str) -> "Circuit":
        """Without a node: the edges into it that serve no other node, and all edges out of it."""
        number = self.graph.sources.index(node)
        mask = self.mask.clone()
        mask[number] = False
        mine = self.graph.feeds[:, number]
        alone = mine & (self.graph.feeds & self._inside()[None]).sum(1).le(1)
        mask[:, alone] = False
        return replace(self, mask=mask)

    def __and__(self, other: "Circuit") -> "Circuit":
        return replace(self, mask=self.mask & _same(self, other).mask)

    def __or__(self, other: "Circuit") -> "Circuit":
        return replace(self, mask=self.mask | _same(self, other).mask)

    def __repr__(self) -> str:
        nodes = len(self.nodes)
        return f"Circuit({len(self)} of {self.graph.n_edges} edges, {nodes} nodes)"


def _same(one: Circuit, other: Circuit) -> Circuit:
    if not one.graph.same(other.graph):
        raise UsageError(
            "the circuits are of different graphs",
            given=f"{one.graph!r} and {other.graph!r}",
            do="compare circuits of models with the same parts",
        )
    return other


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per edge; positive: the edge supports the answer (cutting it lowers the metric).

    Attributes:
        graph: The graph.
        values: Mean over prompts, in the metric's unit; 0 where there is no edge.
        how: What made them: method, metric, ablation, prompts.
    """

    graph: Graph
    values: Float[Tensor, "source destination"]
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.shape != self.graph.real.shape:
            raise ShapeMismatch(
                "the scores do not fit the graph",
                given=f"{list(self.values.shape)} for {self.graph!r}",
                do="give one number per source and destination",
            )
        real = self.values[self.graph.real]
        if not bool(torch.isfinite(real).all()):
            raise NotFinite(
                "some edge scores are not numbers",
                given=f"{int((~torch.isfinite(real)).sum())} of {real.numel()}",
                why="a gradient or an activation overflowed",
                do='use float32, or metric="logit_diff"',
            )
        values = torch.where(self.graph.real, self.values, 0.0).float()
        object.__setattr__(self, "values", values)

    def __getitem__(self, edge: str) -> float:
        return float(self.values[self.graph.find(edge)])

    def _ranking(self, signed: bool) -> Tensor:
        """Flat numbers of all edges, the best first; ties keep their order."""
        value = self.values if signed else self.values.abs()
        value = torch.where(self.graph.real, value, -torch.inf).flatten()
        return value.argsort(descending=True, stable=True)[: self.graph.n_edges]

    def _made(self, mask: Tensor, prune: bool, **how: Any) -> Circuit:
        circuit = Circuit(self.graph, mask, {**self.how, **how})
        return circuit.pruned() if prune else circuit

    def _check_count(self, count: int, given: int | float) -> None:
        if not 0 <= count <= self.graph.n_edges:
            raise OutOfRange(
                "no circuit has this many edges",
                given=given,
                why=f"the graph of {self.graph.name} has {self.graph.n_edges}",
                do=f"use 0 to {self.graph.n_edges}",
            )

    def top(self, n: int | float, *, signed: bool = False, prune: bool = True) -> Circuit:
        """The n best edges.

        Args:
            n: How many; a float is a share of all edges, cut to a whole number as MIB does.
            signed: Rank by the number itself; else by its size, whatever its sign.
            prune: Take away what leads nowhere; the circuit is then smaller than n.

        Raises:
            OutOfRange: More edges than there are.
        """
        count = int(n * self.graph.n_edges) if isinstance(n, float) else n
        self._check_count(count, n)
        mask = torch.zeros(self.graph.real.numel(), dtype=torch.bool)
        mask[self._ranking(signed)[:count]] = True
        mask = mask.view(self.graph.real.shape)
        return self._made(mask, prune, selection="top", n=count, signed=signed)

    def sized(self, size: int, *, signed: bool = False) -> Circuit:
        """The pruned circuit with at most `size` edges that uses as many of the best as it can."""
        low, high = 0, self.graph.n_edges
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.top(middle, signed=signed)) <= size:
                low = middle
            else:
                high = middle - 1
        return self.top(low, signed=signed)

    def threshold(self, at: float, *, signed: bool = False, prune: bool = True) -> Circuit:
        """All edges that score at least `at` (by size, unless `signed`)."""
        value = self.values if signed else self.values.abs()
        return self._made(value >= at, prune, selection="threshold", at=at, signed=signed)

    def greedy(self, n: int, *, signed: bool = False, prune: bool = True) -> Circuit:
        """n edges grown from the logits up: always the best edge into a node that is already in.

        Raises:
            OutOfRange: More edges than there are.
        """
        self._check_count(n, n)
        value = self.values if signed else self.values.abs()
        last = len(self.graph.destinations) - 1
        mask = torch.zeros_like(self.graph.real)
        heap: list[tuple[float, int, int]] = []
        reached: set[int] = set()

        def reach(destination: int) -> None:
            if destination in reached:
                return
            reached.add(destination)
            for source in self.graph.real[:, destination].nonzero()[:, 0].tolist():
                heapq.heappush(heap, (-float(value[source, destination]), source, destination))

        reach(last)
        for _ in range(n):
            if not heap:
                break
            _, source, destination = heapq.heappop(heap)
            mask[source, destination] = True
            for inner in self.graph.feeds[:, source].nonzero()[:, 0].tolist():
                reach(inner)
        return self._made(mask, prune, selection="greedy", n=n, signed=signed)

    def strongest(self, n: int = 10) -> list[tuple[str, float]]:
        """The n largest scores by size, with their edges' names."""
        width = self.values.shape[1]
        numbers = self._ranking(signed=False)[:n].tolist()
        return [
            (self.graph.edge(i // width, i % width), float(self.values.flatten()[i]))
            for i in numbers
        ]

    def __repr__(self) -> str:
        made = self.how.get("method", "given")
        return f"Scores({made}: {self.graph.n_edges} edges of {self.graph.name})"


def combine(scores: Sequence[Scores], how: str = "mean") -> Scores:
    """Several scores of the same edges as one (ensembles won MIB's shared task of 2025).

    Each is divided by its largest size first, since methods differ in scale.

    Args:
        scores: Of one graph.
        how: "mean"; "min" or "max" of the sizes, with the sign of the mean; or "rank", the mean
            rank.

    Raises:
        UsageError: Nothing to combine, different graphs, or an unknown way.
    """
    if not scores or any(not s.graph.same(scores[0].graph) for s in scores):
        raise UsageError(
            "scores of one graph are needed",
            given=", ".join(map(repr, scores)) or "none",
            do="give one or more, of models with the same parts",
        )
    ways = ("mean", "min", "max", "rank")
    if how not in ways:
        raise UsageError("no such way to combine scores", given=how, do=f"use {', '.join(ways)}")
    graph = scores[0].graph
    each = torch.stack([s.values / s.values.abs().max().clamp(min=1e-30) for s in scores])
    sign, size = each.mean(0).sign(), each.abs()
    if how == "mean":
        values = each.mean(0)
    elif how == "rank":
        ranks = torch.stack([_ranks(s.values.abs(), graph.real) for s in scores])
        values = sign * ranks.mean(0)
    else:
        values = sign * (size.amin(0) if how == "min" else size.amax(0))
    names = [str(s.how.get("method", "given")) for s in scores]
    return Scores(graph, values, {"method": f"{how} of {', '.join(names)}"})


def _ranks(size: Tensor, real: Tensor) -> Tensor:
    """Ranks of the edges by size, 1 for the best."""
    flat = torch.zeros(real.numel())
    order = torch.where(real, size, -1.0).flatten().argsort(stable=True)
    flat[order] = torch.arange(1, real.numel() + 1) / real.numel()
    return flat.view(real.shape)
