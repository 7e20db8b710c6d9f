"""Edges by estimate, each beside its exact effect; known circuits and the built-in model."""

import numpy as np
import pytest
import torch

import underhood as uh
from underhood.circuits import METHODS, Wiring, edge_scores
from underhood.circuits.truth import recovery
from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.data import metric_named
from underhood.methods.locate.edge_attribution import edge_attribution, scores_of
from underhood.organisms import wired

BY_HAND = ("previous_token", "induction", "gqa", "decoy", "xor", "parallel", "backup")
PAIRS = uh.Pairs.one("the capital of France is", "the capital of Japan is", "Paris", "Tokyo")


@pytest.fixture(scope="module")
def town() -> uh.Model:
    return uh.load("village")


@pytest.mark.parametrize("name", [*BY_HAND, "reverse", "sort_unique"])
def test_known_circuits_are_found(name):
    """Exact effects rank every true edge before every false one; EAP-IG at least nearly so."""
    organism = wired(name)
    wiring, metric = Wiring(organism.model), metric_named("logit_diff")
    pairs = organism.pairs(n=6).encode(organism.model)
    truth = organism.truth.edges["resample"]
    exact = edge_scores(wiring, pairs, metric, method="exact")
    assert recovery(exact, truth).auroc == 1.0
    assert recovery(exact, truth).precision == 1.0
    estimate = edge_scores(wiring, pairs, metric, method="eap-ig")
    assert recovery(estimate, truth).auroc >= 0.95
    chance = edge_scores(wiring, pairs, metric, method="random")
    assert recovery(chance, truth).auroc < 0.8


def test_steps_of_a_saturated_program_need_many_points():
    """hist turns on a count at a sharp step, which five points of the line miss."""
    organism = wired("hist")
    wiring, metric = Wiring(organism.model), metric_named("logit_diff")
    pairs = organism.pairs(n=6).encode(organism.model)
    found = [
        recovery(
            edge_scores(wiring, pairs, metric, steps=n), organism.truth.edges["resample"]
        ).auroc
        for n in (5, 100)
    ]
    assert found[0] < 0.9 and found[1] == 1.0


def test_on_a_linear_network_estimate_and_exact_are_one():
    """EAP, both eap-ig, RelP's rules aside: all equal the exact effect; the logits' sum is told."""
    organism = wired("linear")
    wiring, metric = Wiring(organism.model), metric_named("logit_diff")
    pairs = organism.pairs(n=6).encode(organism.model)
    exact = edge_scores(wiring, pairs, metric, method="exact").values
    for by in ("eap", "clean-corrupted", "eap-ig", "eap-ig-activations"):
        found = edge_scores(wiring, pairs, metric, method=by).values
        torch.testing.assert_close(found, exact, atol=1e-5 * float(exact.abs().max()), rtol=1e-4)
    ends = [metric(wiring.writes(t).logits, pairs.answers, pairs.wrong).mean()
            for t in (pairs.clean, pairs.contrast)]  # fmt: skip
    assert float(exact[:, -1].sum()) == pytest.approx(float(ends[0] - ends[1]), rel=1e-4)


def test_the_result_is_a_table_of_edges_with_their_check(town):
    found = edge_attribution(town, PAIRS, verify_top=10, seed=1)
    data = found.data
    assert data.sizes["edge"] == int(Wiring(town).graph.real.sum())
    checked = data["verified"].values
    assert (checked == 1).sum() == 10 and (checked == 2).sum() == 10
    assert np.isfinite(data["exact"].values[checked > 0]).all()
    assert np.isnan(data["exact"].values[checked == 0]).all()
    assert float(data["pearson_all"]) > 0.9 > float(data["pearson_chance"])
    assert "input-&gt;a0.h3&lt;v&gt;" in found.view.html()
    wiring = Wiring(town)
    again = scores_of(wiring, found)
    row = list(data["name"].values).index("a0.h3->a1.h3<v>")
    assert again["a0.h3->a1.h3<v>"] == pytest.approx(float(data["score"][row]))


@pytest.mark.parametrize("by", [m for m in METHODS if m != "random"])
def test_every_way_runs(by, town):
    found = edge_attribution(town, PAIRS, by=by, steps=2, verify_top=3)
    assert np.isfinite(found["score"].values).all()
    assert ("exact" in found.data) == (by != "exact")


def test_exact_and_estimate_have_one_sign(town):
    """Positive: cutting the edge lowers the metric."""
    found = edge_attribution(town, PAIRS, by="exact")
    wiring = Wiring(town)
    name = str(found["name"].values[int(found["score"].values.argmax())])
    keep = torch.ones(wiring.graph.real.shape)
    keep[wiring.graph.find(name)] = 0
    pairs = PAIRS.encode(town)
    metric = metric_named("logit_diff")
    logits = wiring.logits(pairs.clean, wiring.writes(pairs.contrast), keep)
    base = wiring.writes(pairs.clean).logits
    gap = [float(metric(x, pairs.answers, pairs.wrong)) for x in (base, logits)]
    assert float(found["score"].max()) == pytest.approx(gap[0] - gap[1], abs=1e-3)


def test_bad_requests(town):
    with pytest.raises(OutOfRange):
        edge_attribution(town, PAIRS, top=0)
    with pytest.raises(UsageError, match="no meaning under zero ablation"):
        edge_attribution(town, PAIRS, ablation="zero")
    bert = uh.load(uh.load("random/bert", vocab_size=len(town.tokenizer)).module, town.tokenizer)
    with pytest.raises(NotOffered, match="edges are not defined"):
        edge_attribution(bert, PAIRS)
