"""Edge attribution: which connections between parts carry the behaviour.

    score(u -> v) = (a_u(clean) - a_u(contrast)) . dm/d in_v        summed over positions

`u` is what one part writes into the residual stream (the embedding, a head, an MLP), `in_v` the
stream as one part reads it (a head's queries, keys or values, an MLP, the logits). All edges come
from a few backward passes; the strongest ones, and a random sample of the others, are then cut for
real, and both numbers are shown.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from underhood.circuits.ablation import Ablation
from underhood.circuits.circuit import Scores
from underhood.circuits.exact import edge_effects
from underhood.circuits.graph import Graph
from underhood.circuits.score import edge_scores
from underhood.circuits.wiring import Wiring
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.core.sweep import rows_per_pass
from underhood.data import EncodedPairs, Metric, Pairs, metric_named
from underhood.methods.graph_view import graph_view
from underhood.methods.locate._options import By, Cut, at_least
from underhood.methods.locate._verify import Verified, verify
from underhood.methods.registry import method
from underhood.view import Result, View, group, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["edge_attribution", "scores_of"]

_DRAWN = 200  # edges of the picture


@method
def edge_attribution(
    model: Model,
    pairs: Pairs,
    *,
    by: By = "eap-ig",
    metric: str = "logit_diff",
    steps: int = 5,
    ablation: Cut = "resample",
    experts: bool = False,
    verify_top: int = 20,
    top: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """How much each edge between two parts supports the answer.

    Args:
        pairs: Clean and contrast prompts of equal length, with answers.
        by: How edges are scored. "eap-ig": gradients along the line between the two prompts'
            embeddings; "eap": gradient at the clean run; "clean-corrupted": mean of both ends;
            "eap-ig-activations": each sub-layer's edges along the line between its outputs; "relp":
            relevance at the contrast run; "exact": every edge cut by itself; "ifr": what flows,
            whatever for.
        metric: What is measured (see `uh.data.METRICS`).
        steps: Points on each line of the two eap-ig ways.
        ablation: What a cut edge carries: the contrast's value, a mean, or zero.
        experts: Take mixtures of experts apart: every expert and router is a node of its own.
        verify_top: How many of the strongest edges to cut for real, and as many random others; 0:
            none. Not needed for "exact"; "ifr" has no unit, so only its ranking is compared.
        top: Edges to list.
        batch_size: Prompts of one pass; scores do not depend on it.
        seed: Of the random others.

    Returns:
        Over `edge` (coordinates `name`, `source`, `destination`): `score` in the metric's unit
        (mean over prompts; positive: cutting the edge lowers the metric), and where verified
        `exact` (else NaN), `verified` (0 not run, 1 strongest, 2 random other) and the agreement.

    Raises:
        NotOffered: Edges are undefined: the stream is not a sum of what parts write (BERT). With
            `experts`: there are no mixtures, or they cannot be taken apart.
        UsageError: An ablation that the way of scoring has no meaning for.
        OutOfRange: A count that is too small.
        NotFinite: Scores that are not numbers.

    Cost: 2 forwards and `steps` forwards and backwards ("eap": one); memory of one backward pass,
        whatever the number of heads. Verification: about `2 * verify_top` rows of one prompt each.

    Source: EAP: Syed et al. 2023; EAP-IG: Hanna et al. 2024, points from the contrast on as in its
        published code, and on activations each sub-layer's own edges only (its code adds up all of
        them, with gradients cut off at the sub-layer); RelP: Jafari et al. 2025 (LN, identity and
        half rules); IFR: Ferrando and Voita 2024. Ours: the factored form, one key and value
        destination per key/value head, scores as means over prompts, and the verification.

    Misleads: a gradient is blind where the softmax is saturated, and misses edges that only work
        together. Scores depend on the ablation. Under a norm of the heads' sum (Gemma 2, OLMo 2)
        the norm's scale is taken as it is in each run. An edge's score says nothing about what is
        left when all others are cut: that is `circuit`.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> pairs = uh.Pairs.one("the capital of France is", "the capital of Japan is",
        ...                      "Paris", "Tokyo")
        >>> found = edge_attribution(model, pairs, by="eap", verify_top=4)
        >>> bool(abs(found["pearson_all"]) > found["pearson_chance"])
        True
    """
    at_least(1, top=top, batch_size=batch_size)
    at_least(0, verify_top=verify_top)
    measure = metric_named(metric)
    encoded = pairs.encode(model)
    wiring = Wiring(model, Graph.of(model, experts=experts))
    scores = edge_scores(
        wiring, encoded, measure, method=by, steps=steps, ablation=ablation, batch_size=batch_size
    )
    checked = None
    if verify_top and by != "exact":
        checked = _verified(wiring, encoded, measure, scores, ablation, verify_top, seed)
    return Result(
        name="edge_attribution",
        data=_data(scores, checked),
        view=_view(scores, checked, measure, top),
        provenance=describe(
            model, pairs=len(pairs), by=by, metric=metric, steps=steps, ablation=ablation,
            experts=experts, verify_top=verify_top, seed=seed,
        ),
    )  # fmt: skip


def scores_of(wiring: Wiring, result: Result) -> Scores:
    """The scores of an `edge_attribution` result, to choose circuits by."""
    values = torch.zeros(wiring.graph.real.shape)
    for name, score in zip(result["name"].values, result["score"].values, strict=True):
        values[wiring.graph.find(str(name))] = float(score)
    keys = ("by", "metric", "ablation", "experts", "steps", "pairs")
    return Scores(wiring.graph, values, {k: result.provenance.get(k) for k in keys})


def _verified(
    wiring: Wiring,
    pairs: EncodedPairs,
    metric: Metric,
    scores: Scores,
    ablation: str,
    k: int,
    seed: int,
) -> Verified:
    """The strongest edges and random others, cut for real."""
    edges = [(int(u), int(v)) for u, v in scores.graph.real.nonzero().tolist()]
    exact = _exact(wiring, pairs, metric, edges, ablation)
    estimates = scores.values[scores.graph.real]
    unsigned = scores.how["method"] == "ifr"
    return verify(estimates, exact, k=k, tail=k, seed=seed, unsigned=unsigned)


def _exact(
    wiring: Wiring,
    pairs: EncodedPairs,
    metric: Metric,
    edges: Sequence[tuple[int, int]],
    ablation: str,
) -> Callable[[Sequence[Sequence[int]]], Tensor]:
    """Exact effects of single edges, mean over the prompts."""
    size = rows_per_pass(pairs.clean.ids.shape[1])
    other = None if ablation == "resample" else (
        Ablation(wiring, pairs, ablation, size).writes(pairs)
    )  # fmt: skip

    def exact(sets: Sequence[Sequence[int]]) -> Tensor:
        wanted = [edges[cells[0]] for cells in sets]
        return edge_effects(wiring, pairs, metric, wanted, other=other).values.mean(1)

    return exact


def _data(scores: Scores, checked: Verified | None) -> "xarray.Dataset":
    import xarray

    graph = scores.graph
    pairs = graph.real.nonzero().tolist()
    data: dict[str, Any] = {"score": ("edge", scores.values[graph.real].numpy())}
    if checked is not None:
        exact, part = checked.scattered(len(pairs))
        data |= {"exact": ("edge", exact.numpy()), "verified": ("edge", part.numpy())}
        data |= {name: ((), value) for name, value in checked.scalars().items()}
    coords = {
        "name": ("edge", [graph.edge(u, v) for u, v in pairs]),
        "source": ("edge", [graph.sources[u] for u, _ in pairs]),
        "destination": ("edge", [graph.destinations[v] for _, v in pairs]),
    }
    return xarray.Dataset(data, coords=coords)


def _view(scores: Scores, checked: Verified | None, metric: Metric, top: int) -> View:
    unit = "" if scores.how["method"] == "ifr" else metric.unit
    number = {"unit": unit, "format": "+.3f"}
    strongest = scores.strongest(top)
    exact = _exact_by_name(scores, checked)
    columns: list[Any] = [{"name": "edge"}, {"name": "score", **number}]
    rows: list[list[Any]] = [[name, value] for name, value in strongest]
    if checked is not None:
        columns.append({"name": "cut for real", **number})
        rows = [[*row, exact.get(row[0])] for row in rows]
    parts: list[View] = [
        sentences(_statements(scores, strongest, unit), title="Edges"),
        graph_view(
            scores.graph, scores.strongest(max(top, _DRAWN)), unit=unit, title="The strongest edges"
        ),
        table(columns, rows, title=f"The {len(rows)} strongest of {scores.graph.n_edges} edges"),
    ]
    if checked is not None:
        pairs = scores.graph.real.nonzero().tolist()
        parts.append(checked.view([scores.graph.edge(u, v) for u, v in pairs], unit=unit))
    return group(parts, title="Edge attribution", about=_ABOUT)


_ABOUT = (
    "a0.h1->a2.h3<k>: what head 1 of layer 0 writes, as the keys of head 3 of layer 2 read it."
    " Positive: the edge supports the answer."
)


def _exact_by_name(scores: Scores, checked: Verified | None) -> dict[str, float]:
    if checked is None:
        return {}
    pairs = scores.graph.real.nonzero().tolist()
    return {
        scores.graph.edge(*pairs[int(cell)]): float(value)
        for cell, value in zip(checked.cells, checked.exact, strict=True)
    }


def _statements(scores: Scores, strongest: list[tuple[str, float]], unit: str) -> list[str]:
    name, value = strongest[0]
    size = scores.values.abs()
    total = float(size.sum())
    few = sum(abs(v) for _, v in strongest) / total if total else 0.0
    return [
        f"The strongest edge is {name}: {value:+.3f} {unit}".rstrip() + ".",
        f"The {len(strongest)} strongest of {scores.graph.n_edges} edges hold {few:.0%} of all"
        " scores' size.",
    ]
