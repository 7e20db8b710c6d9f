"""What training a mask brought: its circuit beside EAP-IG's of equal size, and random ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.faithfulness import Judge, random_circuits
from underhood.circuits.masks import CircuitMasks
from underhood.data import kl

__all__ = ["Compared", "compared", "node_sizes", "of_nodes"]


@dataclass(frozen=True, slots=True)
class Compared:
    """A trained circuit beside others of its size.

    Attributes:
        found: The masks.
        level: "edge" or "node".
        scores: EAP-IG's, from the same prompts.
        rival: EAP-IG's circuit of the same size.
        f: Faithfulness on the judged prompts.
        interval: Its 95 percent interval over prompts.
        f_rival: The rival's.
        f_random: Those of random circuits of the same size.
        f_rest: That of everything else.
        kl: KL from the whole model, in nats: the circuit's, the rival's, the random ones' mean.
        f_train: f on the prompts of training.
        needed: How many parts EAP-IG's ranking takes to keep `f_train` there.
        judged: Prompts that it was judged on.
        held_out: Whether these took no part in training.
    """

    found: CircuitMasks
    level: str
    scores: Scores
    rival: Circuit
    f: float
    interval: tuple[float, float]
    f_rival: float
    f_random: Float[Tensor, " draw"]
    f_rest: float
    kl: tuple[float, float, float]
    f_train: float
    needed: int
    judged: int
    held_out: bool

    @property
    def size(self) -> int:
        """Edges of the circuit, or nodes that are kept (the input left out)."""
        trained = self.found.trained
        return len(self.found.circuit) if self.level == "edge" else int(trained.kept.sum())

    @property
    def total(self) -> int:
        """Edges or nodes in all."""
        graph = self.scores.graph
        return graph.n_edges if self.level == "edge" else len(graph.sources) - 1


def node_sizes(scores: Scores) -> Float[Tensor, " node"]:
    """How much each node but the input matters: the size of the sum over its edges."""
    return scores.values.sum(1)[1:].abs()


def of_nodes(like: Circuit, kept: Bool[Tensor, " node"]) -> Circuit:
    """The circuit of all edges out of some nodes and the input."""
    rows = torch.cat([torch.ones(1, dtype=torch.bool), kept.cpu()])
    return Circuit(like.graph, rows[:, None] & like.graph.real).pruned()


def compared(
    found: CircuitMasks,
    scores: Scores,
    train: Judge,
    test: Judge,
    *,
    level: str,
    draws: int,
    seed: int,
) -> Compared:
    """The circuit, judged.

    Args:
        found: The masks.
        scores: EAP-IG's scores from the prompts of training.
        train: These prompts.
        test: The prompts to judge on; the same object where none are held out.
        level: "edge" or "node".
        draws: Random circuits of the same size.
        seed: Of these.
    """
    circuit = found.circuit
    if level == "edge":
        rival = scores.sized(len(circuit))
        others = random_circuits(circuit, draws, seed=seed)
    else:
        rival = _best_nodes(scores, int(found.trained.kept.sum()))
        others = _random_nodes(found, draws, seed)
    values = test.values([circuit])
    low, high = test.interval(values, seed=seed)[0].tolist()
    f = test.faithfulness([circuit, rival, circuit.complement(), *others])
    # KL is measured whatever the metric is: two circuits can differ in one and not in the other.
    far = Judge(test.wiring, test.pairs, kl, test.ablation, test.batch_size)
    nats = (-far.values([circuit, rival, *others])).mean(1).tolist()
    kept = float(train.faithfulness([circuit])[0])
    return Compared(
        found, level, scores, rival, float(f[0]), (low, high), float(f[1]), f[3:], float(f[2]),
        (nats[0], nats[1], sum(nats[2:]) / draws), kept,
        _needed(scores, train, kept, level), len(test.pairs), test is not train,
    )  # fmt: skip


def _best_nodes(scores: Scores, count: int) -> Circuit:
    kept = torch.zeros(len(scores.graph.sources) - 1, dtype=torch.bool)
    kept[node_sizes(scores).argsort(descending=True, stable=True)[:count]] = True
    return of_nodes(Circuit.whole(scores.graph), kept)


def _random_nodes(found: CircuitMasks, draws: int, seed: int) -> list[Circuit]:
    make = torch.Generator().manual_seed(seed)
    kept = found.trained.kept
    orders = [torch.randperm(len(kept), generator=make) for _ in range(draws)]
    return [of_nodes(found.circuit, kept[order]) for order in orders]


def _needed(scores: Scores, judge: Judge, target: float, level: str) -> int:
    """How many of the best parts keep as much."""
    if target <= 0:
        return 0
    if level == "edge":
        return len(judge.search(scores, min(target, 1.0))[0])
    nested = [_best_nodes(scores, n) for n in range(len(scores.graph.sources))]
    enough: Sequence[bool] = (judge.faithfulness(nested) >= min(target, 1.0) - 1e-6).tolist()
    return enough.index(True)
