"""ACDC: take edges away one after the other, from the logits down, where little is lost.

All edges into a node are tried before its sources are looked at. An edge stays out when the
distance between model and circuit grows by less than the threshold:

    D(C without e) - D(C) < threshold,    D = KL(model || C), or what the metric loses

Each trial depends on the last, but most edges go; so the next trials are run as one batch as if
each of them went, and the batch is used up to the first edge that stays. The result is that of the
plain loop.

Source: Conmy et al., 2023, "Towards Automated Circuit Discovery".
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.ablation import cutting
from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.faithfulness import Judge
from underhood.core.errors import UsageError

__all__ = ["THRESHOLDS", "acdc", "acdc_scores"]

THRESHOLDS = tuple(m * 10.0**e for e in (-5, -4, -3, -2) for m in (1, 3, 5, 7, 9))
AHEAD = 32  # trials of one batch at most


def acdc(
    judge: Judge,
    threshold: float,
    *,
    start: Circuit | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Circuit:
    """The edges that ACDC keeps.

    Args:
        judge: Model, prompts, metric and ablation; with the metric "kl" the distance is KL.
        threshold: How much more distance an edge must be worth, in the metric's unit.
        start: Edges to begin with; default all.
        progress: Called with the edges tried and the edges in all.

    Raises:
        UsageError: A negative threshold.

    Cost: about one forward per edge of the graph.
    """
    if threshold < 0:
        raise UsageError("a threshold is not negative", given=threshold, do="use 1e-5 to 0.1")
    graph = judge.wiring.graph
    mask = (start.mask if start else graph.real).clone()
    order = [
        (source, destination)
        for destination in reversed(range(len(graph.destinations)))
        for source in reversed(graph.real[:, destination].nonzero()[:, 0].tolist())
        if bool(mask[source, destination])
    ]
    now = _distance(judge, [mask])[0]
    done, ahead = 0, 1
    while done < len(order):
        trials = order[done : done + ahead]
        masks = _without(mask, trials)
        distances = _distance(judge, masks)
        went = 0
        for number, distance in enumerate(distances.tolist()):
            done += 1
            if distance - now >= threshold:
                break
            mask, now, went = masks[number], distance, went + 1
        ahead = min(AHEAD, 2 * ahead) if went == len(trials) else max(1, ahead // 2)
        if progress is not None:
            progress(done, len(order))
    return Circuit(graph, mask, _how(judge) | {"threshold": threshold}).pruned()


def _how(judge: Judge) -> dict[str, Any]:
    made = {"method": "acdc", "metric": judge.metric.name, "prompts": len(judge.pairs)}
    return made | cutting(judge.wiring, judge.ablation)


def _without(mask: Tensor, trials: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The mask with the first edge out, the first two out, ..."""
    masks = []
    for edge in trials:
        mask = mask.clone()
        mask[edge] = False
        masks.append(mask)
    return masks


def _distance(judge: Judge, masks: Sequence[Tensor]) -> Float[Tensor, " mask"]:
    """How far each circuit is from the model: what the metric loses (KL loses its own size)."""
    circuits = [Circuit(judge.wiring.graph, mask.bool()) for mask in masks]
    return (judge.whole[None] - judge.values(circuits)).mean(1)


def acdc_scores(judge: Judge, thresholds: Sequence[float] = THRESHOLDS) -> Scores:
    """A score per edge from runs at several thresholds: the largest one that it survives.

    Cost: one run of `acdc` for each threshold; each starts from what the last one kept.
    """
    graph = judge.wiring.graph
    values = torch.zeros(graph.real.shape)
    kept: Circuit | None = None
    for threshold in sorted(thresholds):
        kept = acdc(judge, threshold, start=kept)
        values[kept.mask] = threshold
    return Scores(graph, values, _how(judge))
