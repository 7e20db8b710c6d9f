"""Scores of experts and routers, against masks, against sums and against the mixture as a whole."""

from functools import cache

import pytest
import torch
from torch import Tensor

import underhood as uh
from underhood.circuits import Graph, Wiring
from underhood.circuits.ablation import ABLATIONS, Ablation
from underhood.circuits.exact import edge_effects
from underhood.circuits.flow import flow_scores
from underhood.circuits.gradients import Attributor
from underhood.circuits.score import edge_scores

MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "gpt_oss", "deepseek_v3", "jamba",
)  # fmt: skip
SHARED = ("qwen2_moe", "qwen3_next", "deepseek_v3")
FREE = pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
EVERY = pytest.mark.parametrize("family", MIXTURES)


@cache
def _split(model: uh.Model, freeze: bool) -> Wiring:
    return Wiring(model, Graph.of(model, experts=True), freeze_routing=freeze)


@pytest.fixture(scope="session")
def split_of(wiring_of):
    """A tiny random mixture's wiring with experts as nodes: `(family, freeze)`."""
    return lambda family, freeze=False: _split(wiring_of(family).model, freeze)


def _owners(whole: Graph, parts: Graph) -> tuple[Tensor, Tensor]:
    """For each node of the finer graph, the node of the other that it belongs to."""
    rows = [whole.sources.index(n.split(".e")[0].removesuffix(".s")) for n in parts.sources]
    ends = [whole.destinations.index(n.removesuffix("<router>")) for n in parts.destinations]
    return torch.tensor(rows), torch.tensor(ends)


# Scores ------------------------------------------------------------------------------------------


@FREE
@EVERY
def test_eap_is_the_derivative_of_the_mask(family, freeze, split_of, pairs_of, metric):
    wiring, pairs = split_of(family, freeze), pairs_of(family)
    cut = Ablation(wiring, pairs, "resample", 8)
    found = Attributor(wiring, metric).scores(pairs, cut, at="clean")
    keep = torch.ones(wiring.graph.real.shape, requires_grad=True)
    logits = wiring.logits(pairs.clean, wiring.writes(pairs.contrast), keep, grad=True)
    value = metric(logits, pairs.answers, pairs.wrong).sum()
    truth = torch.autograd.grad(value, keep)[0].double() * wiring.graph.real
    torch.testing.assert_close(found, truth, atol=1e-4 * float(truth.abs().max()), rtol=1e-3)
    into = {n: truth[:, i].abs().max() for i, n in enumerate(wiring.graph.destinations)}
    out = {n: truth[i].abs().max() for i, n in enumerate(wiring.graph.sources)}
    assert sum(float(v) > 1e-2 for n, v in out.items() if ".e" in n) > 3
    routers = [float(v) for n, v in into.items() if n.endswith("<router>")]
    assert not any(routers) if freeze else max(routers) > 1e-3


@pytest.mark.parametrize(("by", "family"), [
    *(("eap", family) for family in MIXTURES),
    ("eap-ig", "qwen3_next"), ("relp", "mixtral"), ("relp", "gpt_oss"), ("relp", "jamba"),
    ("clean-corrupted", "qwen2_moe"), ("eap-ig-activations", "mixtral"),
    ("eap-ig-activations", "deepseek_v3"),
])  # fmt: skip
def test_scores_of_parts_sum_to_those_of_the_mixture(
    family, by, split_of, wiring_of, pairs_of, metric
):
    whole, parts = wiring_of(family), split_of(family)
    ours, theirs = (
        edge_scores(w, pairs_of(family), metric, method=by, steps=2).values.double()
        for w in (parts, whole)
    )
    rows, columns = _owners(whole.graph, parts.graph)
    assert theirs.abs().max() > 0.01
    places = (rows[:, None].expand(ours.shape), columns[None].expand(ours.shape))
    summed = torch.zeros_like(theirs).index_put(places, ours, accumulate=True)
    torch.testing.assert_close(summed, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


@FREE
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "jamba"])
def test_exact_effects_are_those_of_one_mask_per_edge(family, freeze, split_of, pairs_of, metric):
    wiring, pairs = split_of(family, freeze), pairs_of(family, 2)
    graph = wiring.graph
    every = [(int(u), int(v)) for u, v in graph.real.nonzero().tolist()]
    mine = [e for e in every if "m" in graph.edge(*e)]
    edges = mine[:: max(1, len(mine) // 20)] + every[:: max(1, len(every) // 6)]
    edges += [e for e in mine if graph.edge(*e).endswith("<router>")][::5]
    found = edge_effects(wiring, pairs, metric, edges).values
    contrast = wiring.writes(pairs.contrast)
    base = metric(wiring.writes(pairs.clean).logits, pairs.answers, pairs.wrong)
    for row in range(2):
        keep = torch.ones(len(edges), *graph.real.shape)
        for number, edge in enumerate(edges):
            keep[number][edge] = 0
        rows = [row] * len(edges)
        logits = wiring.logits(pairs.clean.rows(rows), contrast.rows(rows), keep)
        value = metric(logits, pairs.answers[rows], pairs.wrong[rows])
        truth = (base[row] - value).double()
        torch.testing.assert_close(found[:, row], truth, atol=3e-5, rtol=1e-3)
        assert truth.abs().max() > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_flow_is_that_of_the_streams(family, split_of, pairs_of):
    """Written out for two destinations; experts that are not chosen bring nothing."""
    wiring, pairs = split_of(family), pairs_of(family)
    graph, found = wiring.graph, flow_scores(wiring, pairs_of(family))
    now = wiring.writes(pairs.clean)
    parts = torch.cat([wiring.split(i, v) for i, v in enumerate(now.values)], 2)
    stream = wiring.model.run(pairs.clean, record="resid_mid")["resid_mid", 2]
    before = graph.real[:, graph.destinations.index("m2")]
    share = stream.abs().sum(-1)[..., None] - (stream[:, :, None] - parts).abs().sum(-1)
    share = share.clamp(min=0)[..., before].double()
    share = (share / share.sum(-1, keepdim=True)).mean(1).sum(0)
    for end in ("m2", "m2<router>"):
        column = found[:, graph.destinations.index(end)]
        torch.testing.assert_close(column[before], share, atol=1e-5, rtol=1e-4)
    assert float(share.sum()) == pytest.approx(len(pairs))


@pytest.mark.parametrize("by", ["eap", "eap-ig-activations", "exact"])
def test_scores_do_not_depend_on_the_size_of_a_pass(by, split_of, pairs_of, metric):
    wiring, pairs = split_of("mixtral"), pairs_of("mixtral", 3)
    if by == "exact":
        edges = [wiring.graph.find(e) for e in ("m0.e1->m1<router>", "m0.e1->m2", "input->m1")]
        one, many = (edge_effects(wiring, pairs, metric, edges, batch_size=n).values
                     for n in (1, 8))  # fmt: skip
    else:
        one, many = (edge_scores(wiring, pairs, metric, method=by, steps=2, batch_size=n).values
                     for n in (1, 8))  # fmt: skip
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, many, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_every_ablation_has_values_for_experts(kind, split_of, pairs_of, metric):
    wiring, pairs = split_of("qwen2_moe"), pairs_of("qwen2_moe")
    cut = Ablation(wiring, pairs, kind, 2)
    other, model = cut.writes(pairs), wiring.model
    number = next(i for i, w in enumerate(wiring.graph.writers) if w.kind == "experts")
    layer = wiring.graph.writers[number].layer
    found = wiring.split(number, other.values[number])
    site = f"expert_out.{layer}.2"
    both = torch.cat([model.run(side, record=site)[site] for side in (pairs.clean, pairs.contrast)])
    truth = {
        "resample": both[len(pairs) :], "zero": both[:1] * 0,
        "mean": both[:, 1:].mean((0, 1), keepdim=True), "mean-position": both.mean(0, keepdim=True),
    }[kind]  # fmt: skip
    torch.testing.assert_close(
        found[:, :, 2], truth.expand_as(found[:, :, 2]), atol=1e-5, rtol=1e-4
    )
