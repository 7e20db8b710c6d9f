"""A circuit and its proof: the edges that carry a behaviour, and what is left with only them.

    f(C) = (m(C) - m(none)) / (m(model) - m(none))

m(C) is the metric when every edge outside C carries the contrast's value (or a mean, or nothing).
A circuit is a claim: these edges do it. Its proof has four parts, and all four are always given:
f of the circuit, f of random circuits of the same size, f of everything but the circuit
(completeness), and f over all sizes. Where there are prompts enough, the circuit is chosen on some
and judged on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.acdc import acdc
from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.faithfulness import MIB_SIZES, Curve, Judge, random_circuits
from underhood.circuits.graph import Graph
from underhood.circuits.score import edge_scores
from underhood.circuits.wiring import Wiring
from underhood.core.errors import UsageError
from underhood.core.model import Model
from underhood.core.provenance import describe
from underhood.data import EncodedPairs, Metric, Pairs, metric_named
from underhood.methods.graph_view import circuit_graph
from underhood.methods.locate._options import By, Cut, at_least, below_one
from underhood.methods.registry import method
from underhood.view import Result, View, group, lines, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["Proof", "choose_circuit", "circuit", "prove", "split_prompts"]

Choice = Literal["top", "greedy", "acdc"]

_ENOUGH = 4  # prompts from which on some are held out


@dataclass(frozen=True, slots=True)
class Proof:
    """A circuit and what was measured about it.

    Attributes:
        circuit: The circuit.
        scores: What it was chosen by.
        f: Its faithfulness on the prompts it is judged on.
        interval: 95 percent interval of `f` over prompts (NaN for one prompt).
        random: f of random circuits of the same size.
        rest: f of all other edges.
        curve: f over sizes, ranked by size of the score.
        signed: The same ranked by signed score.
        chance: f over sizes of random rankings.
        minimal: What f loses without one node, by node.
        judged: Number of prompts that it was judged on, and whether others chose it.
        held_out: Whether the circuit was chosen on other prompts.
    """

    circuit: Circuit
    scores: Scores
    f: float
    interval: tuple[float, float]
    random: Float[Tensor, " random"]
    rest: float
    curve: Curve
    signed: Curve
    chance: Float[Tensor, "draw circuit"]
    minimal: dict[str, float]
    judged: int
    held_out: bool


@method
def circuit(
    model: Model,
    pairs: Pairs,
    *,
    by: By = "eap-ig",
    choose: Choice = "top",
    target: float = 0.9,
    edges: int | None = None,
    threshold: float = 0.01,
    metric: str = "logit_diff",
    ablation: Cut = "resample",
    experts: bool = False,
    steps: int = 5,
    draws: int = 10,
    held_out: float = 0.5,
    batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """The smallest circuit found that keeps a share of the behaviour, with its proof.

    Args:
        pairs: Clean and contrast prompts of equal length, with answers.
        by: How edges are scored (see `edge_attribution`).
        choose: "top": the best edges; "greedy": grown from the logits up; "acdc": edges are taken
            away one by one where little is lost (one forward per edge; needs no scores).
        target: Share of the behaviour that the circuit shall keep.
        edges: Take this many edges (before pruning) instead of looking for the target.
        threshold: For "acdc", what an edge must be worth to stay, in the metric's unit.
        metric: What is measured (see `uh.data.METRICS`).
        ablation: What cut edges carry. Circuits depend on it; "zero" is off-distribution.
        experts: Take mixtures of experts apart: every expert and router is a node of its own.
        steps: Points of the eap-ig ways.
        draws: Random circuits of the same size, and random rankings for the curve (a third).
        held_out: Share of the prompts that the circuit is judged on and not chosen by; with fewer
            than four prompts all are used for both, and the result says so.
        batch_size: Rows of one pass; nothing depends on it.
        seed: Of the split and the random circuits.

    Returns:
        Over `edge`: `score`, `in_circuit`. Over `circuit` (coordinates `share` and `size`):
        `faithfulness` (ranked by size), `faithfulness_signed`; over `draw` and `circuit`:
        `faithfulness_random`. Over `node`: `needed`, what f loses without it. Scalars: `f`,
        `f_low`, `f_high`, `f_rest` (completeness), `cpr` (of the signed curve), `cmd` (of the
        other), and over `random` `f_same_size`.

    Raises:
        NotOffered: Edges are undefined in this model, or (with `experts`) its mixtures.
        UsageError: The contrast gives the same metric, so that nothing can be kept or lost.
        OutOfRange: A target, share or count outside its range.

    Cost: the scores; then about 60 circuits for each prompt, several to a pass.

    Source: faithfulness, CPR and CMD as in MIB (Mueller et al. 2025), completeness and minimality
        after Wang et al. 2022, ACDC: Conmy et al. 2023. Ours: random circuits of the same size
        after pruning, the held-out prompts, and intervals over prompts.

    Misleads: f can exceed 1 when edges that work against the answer are left out, and f = 1 does
        not mean that the circuit works as the model does (Miller et al. 2024): other ablations,
        metrics and prompts give other circuits. Redundant edges may be left out of a circuit that
        keeps everything: look at the completeness.

    Example:
        >>> import underhood as uh
        >>> model = uh.load()
        >>> pairs = uh.Pairs.one("the capital of France is", "the capital of Japan is",
        ...                      "Paris", "Tokyo")
        >>> found = circuit(model, pairs, by="eap", draws=3)
        >>> bool(found["f"] >= 0.9), bool(found["f_same_size"].max() < 0.5)
        (True, True)
    """
    measure = metric_named(metric)
    at_least(1, draws=draws, batch_size=batch_size)
    below_one(held_out=held_out)
    encoded = pairs.encode(model)
    wiring = Wiring(model, Graph.of(model, experts=experts))
    train, test = split_prompts(encoded, held_out, seed)
    options = {"by": by, "choose": choose, "target": target, "edges": edges,
               "threshold": threshold, "steps": steps}  # fmt: skip
    scores, found = choose_circuit(wiring, train, measure, ablation, batch_size, **options)
    judge = Judge(wiring, test, measure, ablation, batch_size)
    proof = prove(judge, scores, found, draws=draws, seed=seed, held_out=test is not train)
    return Result(
        name="circuit",
        data=_data(proof),
        view=_view(proof, measure, ablation, target if edges is None else None),
        provenance=describe(
            model, pairs=len(pairs), metric=metric, ablation=ablation, experts=experts, draws=draws,
            held_out=held_out if proof.held_out else 0, seed=seed, **options,
        ),
    )  # fmt: skip


def split_prompts(
    pairs: EncodedPairs, share: float, seed: int
) -> tuple[EncodedPairs, EncodedPairs]:
    """Prompts to choose by and prompts to judge on."""
    n = len(pairs)
    out = round(share * n)
    if n < _ENOUGH or not 0 < out < n:
        return pairs, pairs
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return pairs.rows(sorted(order[out:])), pairs.rows(sorted(order[:out]))


def choose_circuit(
    wiring: Wiring,
    pairs: EncodedPairs,
    metric: Metric,
    ablation: str,
    batch_size: int | None,
    *,
    by: str,
    choose: str,
    target: float,
    edges: int | None,
    threshold: float,
    steps: int,
) -> tuple[Scores, Circuit]:
    """Scores of some prompts, and the circuit chosen by them (options as in `circuit`)."""
    scores = edge_scores(
        wiring, pairs, metric, method=by, steps=steps, ablation=ablation, batch_size=batch_size
    )
    judge = Judge(wiring, pairs, metric, ablation, batch_size)
    if choose == "acdc":
        return scores, acdc(judge, threshold)
    if edges is not None:
        chosen = scores.greedy(edges) if choose == "greedy" else scores.top(edges)
        if not len(chosen):
            raise UsageError(
                "so few edges make no path from the input to the logits",
                given=f"edges={edges}: all of them are pruned away",
                do="ask for more edges, or for a target",
            )
        return scores, chosen
    return scores, judge.search(scores, target, greedy=choose == "greedy")[0]


def prove(
    judge: Judge,
    scores: Scores,
    found: Circuit,
    *,
    draws: int = 10,
    seed: int = 0,
    held_out: bool = False,
    shares: Sequence[float] = MIB_SIZES,
) -> Proof:
    """Everything that is measured about a circuit, on the judge's prompts."""
    values = judge.values([found])
    low, high = judge.interval(values, seed=seed)[0].tolist()
    others = random_circuits(found, draws, seed=seed)
    f = judge.share(values.mean(1))
    same, rest = judge.faithfulness(others), judge.faithfulness([found.complement()])
    chance = []
    for draw in range(max(1, draws // 3)):
        make = torch.Generator().manual_seed(seed + 1 + draw)
        random = Scores(scores.graph, torch.rand(scores.values.shape, generator=make))
        chance.append(judge.curve(random, shares=shares).values)
    return Proof(
        found, scores, float(f[0]), (low, high), same, float(rest[0]),
        judge.curve(scores, shares=shares), judge.curve(scores, shares=shares, signed=True),
        torch.stack(chance), judge.minimality(found), len(judge.pairs), held_out,
    )  # fmt: skip


def _data(proof: Proof) -> "xarray.Dataset":
    import xarray

    graph = proof.scores.graph
    pairs = graph.real.nonzero().tolist()
    curve = proof.curve
    data: dict[str, Any] = {
        "score": ("edge", proof.scores.values[graph.real].numpy()),
        "in_circuit": ("edge", proof.circuit.mask[graph.real].numpy()),
        "faithfulness": ("circuit", curve.values.numpy()),
        "faithfulness_signed": ("circuit", proof.signed.values.numpy()),
        "faithfulness_random": (("draw", "circuit"), proof.chance.numpy()),
        "f_same_size": ("random", proof.random.numpy()),
        "needed": ("node", list(proof.minimal.values())),
        "f": ((), proof.f), "f_low": ((), proof.interval[0]), "f_high": ((), proof.interval[1]),
        "f_rest": ((), proof.rest), "cpr": ((), proof.signed.cpr), "cmd": ((), curve.cmd),
    }  # fmt: skip
    coords = {
        "name": ("edge", [graph.edge(u, v) for u, v in pairs]),
        "share": ("circuit", list(curve.shares)),
        "size": ("circuit", list(curve.sizes)),
        "node": list(proof.minimal),
    }
    return xarray.Dataset(data, coords=coords)


def _view(proof: Proof, metric: Metric, ablation: str, target: float | None) -> View:
    return group(
        [
            sentences(statements(proof, metric, target), title="The circuit and its proof"),
            picture_view(proof, metric),
            curve_view(proof, ablation),
            nodes_view(proof),
        ],
        title="Circuit",
    )


def statements(proof: Proof, metric: Metric, target: float | None) -> list[str]:
    """The claim and its controls in plain sentences; the first one is the headline."""
    n, total = len(proof.circuit), proof.scores.graph.n_edges
    low, high = proof.interval
    span = "" if low != low else f" (95% over prompts: {low:.0%} to {high:.0%})"
    found = [
        f"A circuit of {n} of the {total} edges ({n / total:.1%}) keeps {_percent(proof.f)} of what"
        f" the contrast changes in {metric.name}{span}; random circuits of the same size keep"
        f" {_percent(proof.random.mean())} (at most {_percent(proof.random.max())}).",
        f"All other edges together keep {_percent(proof.rest)} without it"
        + (" (completeness: nothing else does the job)." if abs(proof.rest) < 0.1 else
           ": other edges can do part of the job." if proof.rest >= 0.1 else
           ": they work against the answer."),
    ]  # fmt: skip
    if target is not None and proof.f < target:
        found.append(f"The target was {target:.0%}: the circuit misses it on these prompts.")
    prompts = "prompt" if proof.judged == 1 else f"{proof.judged} prompts"
    found.append(
        f"Judged on {prompts} that took no part in choosing it."
        if proof.held_out
        else f"Chosen and judged on the same {prompts}: on others it may keep less."
    )
    found.append(
        f"Over all sizes: CMD {proof.curve.cmd:.3f} (0 is perfect; random rankings"
        f" {_chance_cmd(proof):.3f}), CPR {proof.signed.cpr:.3f}."
    )
    return found


def _percent(share: SupportsFloat) -> str:
    return f"{round(float(share), 2) + 0.0:.0%}"  # no minus before a zero


def _chance_cmd(proof: Proof) -> float:
    shares = proof.curve.shares
    each = [Curve(shares, proof.curve.sizes, row).cmd for row in proof.chance]
    return sum(each) / len(each)


def curve_view(proof: Proof, ablation: str) -> View:
    """f over sizes, beside random rankings."""
    low, high = proof.chance.amin(0), proof.chance.amax(0)
    return lines(
        [f"{share:.1%}" for share in proof.curve.shares],
        {
            "this ranking": proof.curve.values.tolist(),
            "random ranking": proof.chance.mean(0).tolist(),
        },
        bands={"random ranking": (low.tolist(), high.tolist())},
        x_name="share of all edges",
        y_name="faithfulness",
        title="How much the best edges keep",
        about=f"1: as the whole model; 0: as with every edge cut ({ablation} ablation).",
    )


def picture_view(proof: Proof, metric: Metric) -> View:
    """The circuit as a graph, its proof in the header."""
    facts = {
        "faithfulness": round(proof.f, 3),
        "random circuits of this size": round(float(proof.random.mean()), 3),
        "all other edges": round(proof.rest, 3),
        "edges": len(proof.circuit), "parts": len(proof.minimal),
    }  # fmt: skip
    return circuit_graph(
        proof.circuit, proof.scores, values=proof.minimal, facts=facts, unit=metric.unit,
        value_unit="of f lost without it", title="The circuit",
        about="Lines: the circuit's edges, from below to above, by score. Colour of a node: what"
        " the circuit loses without it.",
    )  # fmt: skip


def nodes_view(proof: Proof) -> View:
    """What the circuit loses without each node."""
    ranked = sorted(proof.minimal.items(), key=lambda item: -abs(item[1]))
    columns = [{"name": "node"}, {"name": "f lost without it", "format": "+.1%"}]
    return table(
        columns,
        [[name, value] for name, value in ranked],
        title="Is each node needed?",
        about="One node at a time is taken out of the circuit; near 0: the circuit does without.",
    )
