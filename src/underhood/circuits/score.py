"""One score per edge, by any of the methods: estimates, exact effects, flow, and chance.

eap                  gradient at the clean run (Syed et al., 2023)            1 F + (F + B)
clean-corrupted      mean of the gradients at both runs                     1 F + 2 (F + B)
eap-ig               along the line between the embeddings                  1 F + m (F + B)
eap-ig-activations   along lines between a sub-layer's outputs    2 F + (2L + 1) m (F + B)
exact                every edge cut by itself                               one row per edge
ifr                  what flows, whatever for                               1 F
random               chance: the control of all others                      none
"""

from collections.abc import Callable

import torch

from underhood.circuits.ablation import Ablation, cutting
from underhood.circuits.circuit import Scores
from underhood.circuits.exact import edge_effects
from underhood.circuits.flow import flow_scores
from underhood.circuits.gradients import Attributor
from underhood.circuits.wiring import Wiring
from underhood.core.errors import UsageError
from underhood.core.sweep import rows_per_pass
from underhood.data import EncodedPairs, Metric

__all__ = ["METHODS", "edge_scores"]

POINT = {
    "eap": "clean", "clean-corrupted": "both", "eap-ig": "inputs",
    "eap-ig-activations": "activations", "relp": "contrast",
}  # fmt: skip
METHODS = (*POINT, "exact", "ifr", "random")


def edge_scores(
    wiring: Wiring,
    pairs: EncodedPairs,
    metric: Metric,
    *,
    method: str = "eap-ig",
    steps: int = 5,
    ablation: str = "resample",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """A score for every edge: mean over the prompts, whatever the size of the passes.

    Args:
        wiring: The model and its graph.
        pairs: The prompts.
        metric: What is measured.
        method: One of `METHODS`.
        steps: Points of each line, for the two eap-ig methods.
        ablation: What a cut edge carries; lines between embeddings exist only for "resample".
        batch_size: Prompts (for "exact": rows) of one pass.
        seed: Of "random".
        progress: Called with what is done and what there is in all.

    Raises:
        UsageError: An unknown method, or an ablation that the method has no meaning for.
        NotFinite: Scores that are not numbers.
    """
    if method not in METHODS:
        raise UsageError("no such method", given=method, do=f"use {', '.join(METHODS)}")
    if method in POINT and not metric.differentiable:
        raise UsageError(
            f"{metric.name} has no gradient",
            given=f"method={method}, metric={metric.name}",
            do='use method="exact", or metric="logit_diff"',
        )
    if ablation != "resample" and method in ("eap-ig", "clean-corrupted", "relp"):
        raise UsageError(
            f"{method} has no meaning under {ablation} ablation",
            given=f"method={method}, ablation={ablation}",
            why="it takes gradients at, or on the way to, the contrast's own run",
            do='use method="eap" or "eap-ig-activations", or ablation="resample"',
        )
    how = {
        "method": method, "metric": metric.name, "prompts": len(pairs),
        **cutting(wiring, ablation), **({"steps": steps} if "ig" in method else {}),
    }  # fmt: skip
    graph = wiring.graph
    if method == "random":
        values = torch.rand(graph.real.shape, generator=torch.Generator().manual_seed(seed))
        return Scores(graph, values, how)
    size = batch_size or rows_per_pass(pairs.clean.ids.shape[1])
    cut = Ablation(wiring, pairs, ablation, size)
    total = torch.zeros(graph.real.shape, dtype=torch.float64)
    if method == "exact":
        edges = [(int(u), int(v)) for u, v in graph.real.nonzero().tolist()]
        other = None if ablation == "resample" else cut.writes(pairs)
        options = {"other": other, "batch_size": batch_size, "progress": progress}
        effects = edge_effects(wiring, pairs, metric, edges, **options)
        total[graph.real] = effects.values.sum(1)
        return Scores(graph, total / len(pairs), how | {"run": effects.how})
    rules = ("ln", "identity", "half") if method == "relp" else ()
    attributor = Attributor(wiring, metric, rules=rules)
    for rows in pairs.blocks(size):
        part = pairs.rows(rows)
        if method == "ifr":
            total += flow_scores(wiring, part)
        else:
            total += attributor.scores(part, cut, at=POINT[method], steps=steps)
        if progress is not None:
            progress(rows.stop, len(pairs))
    return Scores(graph, total / len(pairs), how)
