"""How much of a behaviour a circuit keeps, and how much is left without it.

    f(C) = (m(C) - m(none)) / (m(model) - m(none))

m(C) is the metric with every edge outside C cut, m(none) with all edges cut. f is 1 for the whole
model and 0 for nothing; it can exceed 1 when the circuit leaves out what works against the answer.
Completeness is f of everything *but* the circuit: near 0 when nothing else does the job. A claim
needs both, and the same numbers for random circuits of the same size.

CPR and CMD are the areas under f and |1 - f| over the share of edges, by the trapezoid rule on the
ten sizes of MIB (Mueller et al., 2025): CPR is made with signed scores, CMD with sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.ablation import Ablation
from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.wiring import Wiring, Writes, last_logits
from underhood.core.errors import UsageError
from underhood.data import EncodedPairs, Metric

__all__ = ["MIB_SIZES", "Curve", "Judge", "area", "random_circuits"]

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Curve:
    """Faithfulness by size.

    Attributes:
        shares: Share of all edges, as asked for (pruning makes circuits smaller).
        sizes: Edges that each circuit really has.
        values: f of each circuit.
    """

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    values: Float[Tensor, " circuit"]

    @property
    def cpr(self) -> float:
        """Area under f."""
        return area(self.shares, self.values)

    @property
    def cmd(self) -> float:
        """Area under |1 - f|."""
        return area(self.shares, (1 - self.values).abs())


def area(x: Sequence[float], y: Tensor) -> float:
    """Trapezoid rule on a linear axis, without a point at 0."""
    return float(torch.trapezoid(y.double(), torch.tensor(x, dtype=torch.float64)))


@dataclass
class Judge:
    """Runs circuits on the same prompts.

    Args:
        wiring: The model and its graph.
        pairs: The prompts.
        metric: What is measured.
        ablation: One of `ablation.ABLATIONS`.
        batch_size: Rows of one pass; default by memory.
        progress: Called with the rows done and the rows in all.

    Raises:
        UsageError: An unknown ablation, or a metric that is the same with and without all edges.
        ShapeMismatch: Means by position of prompts of different length.
    """

    wiring: Wiring
    pairs: EncodedPairs
    metric: Metric
    ablation: str = "resample"
    batch_size: int | None = None
    progress: Callable[[int, int], None] | None = None
    passes: int = field(default=0, init=False)
    _kept: tuple[range, Writes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        columns = self.pairs.clean.ids.shape[1]
        self.size = self.batch_size or self.wiring.rows_per_pass(columns)
        self.cut = Ablation(self.wiring, self.pairs, self.ablation, self.size)
        blocks = self.pairs.blocks(self.size)
        logits = [last_logits(self.wiring.model, self.pairs.clean.rows(b))[0] for b in blocks]
        self.logits = torch.cat(logits)
        self.passes += len(blocks) + self.cut.passes
        self.whole = self._metric(self.logits, range(len(self.pairs)))
        none = torch.zeros(self.wiring.graph.real.shape)
        self.none = self._values([none])[0]
        gap = float((self.whole - self.none).mean())
        if abs(gap) < 1e-6 * max(1.0, float(self.whole.abs().mean())):
            raise UsageError(
                "the metric is the same with all edges and with none",
                given=f"{self.metric.name} {float(self.whole.mean()):+.4g} in both",
                why="the contrast gives the same answer, so that no circuit can be told from none",
                do="use a contrast that changes the answer, or another metric or ablation",
            )

    def values(self, circuits: Sequence[Circuit]) -> Float[Tensor, "circuit batch"]:
        """The metric of each circuit on each prompt, in the metric's unit."""
        return self._values([c.mask.float() for c in circuits])

    def faithfulness(self, circuits: Sequence[Circuit]) -> Float[Tensor, " circuit"]:
        """f of each circuit: a ratio of means over the prompts."""
        return self.share(self.values(circuits).mean(1))

    def share(self, value: Tensor) -> Tensor:
        """A metric's mean as a share of what the edges do."""
        none, whole = self.none.mean(), self.whole.mean()
        return (value - none) / (whole - none)

    def interval(
        self, values: Float[Tensor, "circuit batch"], *, draws: int = 1000, seed: int = 0
    ) -> Float[Tensor, "circuit 2"]:
        """95 percent intervals of f: prompts drawn with replacement (percentile bootstrap).

        One prompt has no interval: NaN.
        """
        n = values.shape[1]
        if n < 2:
            return torch.full((len(values), 2), torch.nan, dtype=torch.float64)
        make = torch.Generator().manual_seed(seed)
        index = torch.randint(n, (draws, n), generator=make)
        none, whole = self.none[index].mean(1), self.whole[index].mean(1)
        f = (values[:, index].mean(2) - none) / (whole - none)
        return torch.quantile(f, torch.tensor([0.025, 0.975], dtype=f.dtype), dim=1).T

    def curve(
        self, scores: Scores, *, shares: Sequence[float] = MIB_SIZES, signed: bool = False,
        greedy: bool = False,
    ) -> Curve:  # fmt: skip
        """f of the best edges at several sizes."""
        counts = [int(share * scores.graph.n_edges) for share in shares]
        if greedy:
            circuits = [scores.greedy(n, signed=signed) for n in counts]
        else:
            circuits = [scores.top(n, signed=signed) for n in counts]
        sizes = tuple(len(c) for c in circuits)
        return Curve(tuple(shares), sizes, self.faithfulness(circuits))

    def search(
        self, scores: Scores, target: float = 0.9, *, signed: bool = False, greedy: bool = False
    ) -> tuple[Circuit, float]:
        """The smallest circuit of the ranking that keeps a share of the behaviour, and its f.

        The sizes of a coarse grid are tried first; the first that is enough is then halved down.
        f need not grow with size, so a smaller one elsewhere in the ranking may be missed.

        Raises:
            UsageError: A target outside 0 to 1.
        """
        if not 0 < target <= 1:
            raise UsageError(
                "a target is a share", given=target, do="use a number above 0, up to 1, such as 0.9"
            )
        total = scores.graph.n_edges
        pick = scores.greedy if greedy else scores.top
        grid = sorted({max(1, round(total * 2.0**-i)) for i in range(total.bit_length() + 1)})
        tried = self.faithfulness([pick(n, signed=signed) for n in grid])
        enough = [i for i, f in enumerate(tried.tolist()) if f >= target]
        first = enough[0] if enough else len(grid) - 1
        low, high = (grid[first - 1] if first else 0), grid[first]
        best, kept = pick(high, signed=signed), float(tried[first])
        while high - low > 1:
            middle = (low + high) // 2
            circuit = pick(middle, signed=signed)
            f = float(self.faithfulness([circuit])[0])
            if f >= target:
                high, best, kept = middle, circuit, f
            else:
                low = middle
        return best, kept

    def minimality(self, circuit: Circuit) -> dict[str, float]:
        """What f loses when one node is taken out of the circuit, node by node."""
        nodes = [n for n in circuit.nodes if n != "input"]
        if not nodes:
            return {}
        f = self.faithfulness([circuit, *(circuit.without(n) for n in nodes)])
        return {node: float(f[0] - now) for node, now in zip(nodes, f[1:], strict=True)}

    def _metric(self, logits: Tensor, rows: Sequence[int]) -> Float[Tensor, " rows"]:
        index = torch.tensor(list(rows))
        answers, wrong = self.pairs.answers[index], self.pairs.wrong[index]
        kept = self.logits[index] if self.metric.uses_reference else None
        return self.metric(logits, answers, wrong, reference=kept).double().cpu()

    def _values(self, masks: Sequence[Tensor]) -> Float[Tensor, "circuit batch"]:
        """The metric with each mask on each prompt; several masks share a pass."""
        found = torch.zeros(len(masks), len(self.pairs), dtype=torch.float64)
        done = 0
        for block in self.pairs.blocks(self.size):
            other = self._other(block)
            each = max(1, self.size // len(block))
            for first in range(0, len(masks), each):
                some = masks[first : first + each]
                found[first : first + each, block.start : block.stop] = self._pass(
                    some, block, other
                )
                done += len(some) * len(block)
                if self.progress is not None:
                    self.progress(done, found.numel())
        return found

    def _pass(self, masks: Sequence[Tensor], block: range, other: Writes) -> Tensor:
        """Some masks on some prompts: one row for each mask and prompt."""
        rows = [row for _ in masks for row in block]
        keep = masks[0] if len(masks) == 1 else (
            torch.stack(list(masks)).repeat_interleave(len(block), 0)
        )  # fmt: skip
        index = [row - block.start for row in rows]
        logits = self.wiring.logits(self.pairs.clean.rows(rows), other.rows(index), keep)
        self.passes += 1
        return self._metric(logits, rows).view(len(masks), len(block))

    def _other(self, block: range) -> Writes:
        """What cut edges carry in some prompts; kept while all of them are one block."""
        if self._kept is not None and self._kept[0] == block:
            return self._kept[1]
        self._kept = block, self.cut.writes(self.pairs.rows(block))
        self.passes += 1
        return self._kept[1]


def random_circuits(circuit: Circuit, n: int, *, seed: int = 0) -> list[Circuit]:
    """Random circuits of about the same size, connected like it: the control.

    Edges get random scores, and as many of the best are taken as leave that size after pruning.
    """
    make = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        values = torch.rand(circuit.graph.real.shape, generator=make)
        scores = Scores(circuit.graph, values, {"method": "random"})
        found.append(scores.sized(len(circuit)))
    return found
