"""Choosing, pruning, judging, and MIB's files."""

import json

import pytest
import torch

from underhood.circuits.acdc import acdc, acdc_scores
from underhood.circuits.circuit import Circuit, Scores, combine
from underhood.circuits.faithfulness import MIB_SIZES, Curve, Judge, area, random_circuits
from underhood.circuits.mib import read_mib, write_mib
from underhood.circuits.wiring import Wiring
from underhood.core.errors import (
    FileProblem,
    NotFinite,
    NotOffered,
    OutOfRange,
    ShapeMismatch,
    UsageError,
)  # fmt: skip
from underhood.data import EncodedPairs, metric_named
from underhood.organisms import wired


def scores_for(graph, seed=0) -> Scores:
    make = torch.Generator().manual_seed(seed)
    return Scores(graph, torch.randn(graph.real.shape, generator=make), {"method": "drawn"})


def plain_prune(edges: set[str]) -> set[str]:
    """Prune by names, written out: node by node until nothing changes."""
    while True:
        starts = {e.split("->")[0] for e in edges}
        ends = {e.split("->")[1].split("<")[0] for e in edges} | {"input"}
        alive = starts & ends
        kept = {
            e for e in edges
            if e.split("->")[0] in alive
            and (e.split("->")[1] == "logits" or e.split("->")[1].split("<")[0] in alive)
        }  # fmt: skip
        if kept == edges:
            return edges
        edges = kept


@pytest.mark.parametrize("seed", range(6))
def test_pruning_equals_pruning_by_names(seed, wiring_of):
    graph = wiring_of("gpt2").graph
    make = torch.Generator().manual_seed(seed)
    mask = torch.rand(graph.real.shape, generator=make) < (0.02, 0.05, 0.1, 0.2, 0.3, 0.6)[seed]
    circuit = Circuit(graph, mask)
    pruned = circuit.pruned()
    assert set(pruned.edges) == plain_prune(set(circuit.edges))
    assert pruned.pruned().edges == pruned.edges


def test_a_key_value_head_serves_its_group(wiring_of):
    """Two query heads read key/value head 0: with one of them alive its keys stay."""
    graph = wiring_of("llama").graph
    edges = ["input->a0.h0<k>", "input->a0.h1<v>", "a0.h1->logits"]
    assert Circuit.of(graph, edges).pruned().edges == ["input->a0.h0<k>", "a0.h1->logits"]
    alone = Circuit.of(graph, ["input->a0.h0<k>", "a0.h2->logits"]).pruned()
    assert not alone.edges  # head 2 reads key/value head 1


@pytest.mark.parametrize("signed", [False, True])
def test_greedy_equals_a_plain_search(signed, wiring_of):
    graph = wiring_of("gpt2").graph
    scores = scores_for(graph)
    reached, taken = {"logits"}, []
    value = {e: scores[e] if signed else abs(scores[e]) for e in graph.names(graph.real)}
    for _ in range(40):
        open_edges = [e for e in value if e.split("->")[1].split("<")[0] in reached]
        best = max((e for e in open_edges if e not in taken), key=lambda e: value[e])
        taken.append(best)
        reached.add(best.split("->")[0])
    assert set(scores.greedy(40, signed=signed, prune=False).edges) == set(taken)


def test_top_takes_the_best_and_threshold_agrees(wiring_of):
    graph = wiring_of("gpt2").graph
    scores = scores_for(graph)
    top = scores.top(30, prune=False)
    lowest = min(abs(scores[e]) for e in top.edges)
    assert len(top) == 30
    assert set(scores.threshold(lowest, prune=False).edges) == set(top.edges)
    assert len(scores.top(0.5, prune=False)) == int(0.5 * graph.n_edges)
    sized = scores.sized(25)
    assert len(sized) <= 25 and sized.pruned().edges == sized.edges
    with pytest.raises(OutOfRange):
        scores.top(graph.n_edges + 1)


def test_scores_refuse_what_is_not_a_number(wiring_of):
    graph = wiring_of("gpt2").graph
    values = torch.zeros(graph.real.shape)
    values[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="1 of"):
        Scores(graph, values)
    with pytest.raises(ShapeMismatch):
        Scores(graph, values[:, 1:])


def test_combined_scores_keep_what_all_agree_on(wiring_of):
    graph = wiring_of("gpt2").graph
    one, two = scores_for(graph, 1), scores_for(graph, 2)
    assert combine([one, one], "mean").top(20).edges == one.top(20).edges
    low = combine([one, two], "min").values.abs()
    for s in (one, two):
        assert bool((low <= s.values.abs() / s.values.abs().max() + 1e-6).all())
    assert bool((combine([one, two], "max").values.abs() >= low).all())
    with pytest.raises(UsageError, match="no such way"):
        combine([one], "product")


# Judging -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(wiring_of, pairs_of, metric) -> Judge:
    return Judge(wiring_of("gpt2"), pairs_of("gpt2"), metric)


def test_everything_keeps_all_and_nothing_none(judged):
    graph = judged.wiring.graph
    whole = Circuit.whole(graph)
    f = judged.faithfulness([whole, whole.complement()])
    torch.testing.assert_close(f, torch.tensor([1.0, 0.0], dtype=f.dtype), atol=1e-5, rtol=0)
    assert len(whole.complement()) == 0


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_nothing_depends_on_the_size_of_a_pass(size, judged, wiring_of, pairs_of, metric):
    scores = scores_for(judged.wiring.graph)
    circuits = [scores.top(n) for n in (40, 120, 200)]
    other = Judge(wiring_of("gpt2"), pairs_of("gpt2"), metric, batch_size=size)
    torch.testing.assert_close(
        other.values(circuits), judged.values(circuits), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("ablation", ["resample", "mean", "mean-position", "zero"])
def test_each_ablation_has_its_own_nothing(ablation, wiring_of, pairs_of, metric):
    judge = Judge(wiring_of("llama"), pairs_of("llama"), metric, ablation)
    f = judge.faithfulness([Circuit.whole(judge.wiring.graph)])
    assert float(f[0]) == pytest.approx(1, abs=1e-5)
    if ablation == "resample":
        contrast = judge.wiring.writes(judge.pairs.contrast).logits
        truth = metric(contrast, judge.pairs.answers, judge.pairs.wrong).double()
        torch.testing.assert_close(judge.none, truth, atol=2e-5, rtol=1e-4)


def test_a_metric_that_does_not_change_is_refused(wiring_of, pairs_of, metric):
    pairs = pairs_of("gpt2")
    same = EncodedPairs(pairs.clean, pairs.clean, pairs.answers, pairs.wrong, [6, 6, 6])
    with pytest.raises(UsageError, match="same with all edges and with none"):
        Judge(wiring_of("gpt2"), same, metric)


def test_the_area_is_that_of_the_trapezoids():
    y = torch.tensor([0.1, 0.4, 0.9])
    assert area((0.0, 0.5, 1.0), y) == pytest.approx(0.5 * 0.25 + 0.5 * 0.65)
    perfect = Curve(MIB_SIZES, (1,) * 10, torch.ones(10))
    assert perfect.cpr == pytest.approx(0.999) and perfect.cmd == 0


def test_the_search_finds_a_circuit_that_keeps_enough(judged):
    scores = scores_for(judged.wiring.graph)
    found, f = judged.search(scores, 0.6)
    assert f >= 0.6
    assert float(judged.faithfulness([found])[0]) == pytest.approx(f, abs=1e-5)


def test_random_circuits_are_as_large_and_connected(judged):
    own = scores_for(judged.wiring.graph).sized(80)
    for other in random_circuits(own, 4, seed=3):
        assert len(own) * 0.7 <= len(other) <= len(own)
        assert other.pruned().edges == other.edges


def test_intervals_cover_the_estimate_and_need_two_prompts(judged, wiring_of, pairs_of, metric):
    values = judged.values([scores_for(judged.wiring.graph).top(150)])
    low, high = judged.interval(values)[0].tolist()
    assert low <= float(judged.share(values.mean(1))[0]) <= high
    one = Judge(wiring_of("gpt2"), pairs_of("gpt2").rows([0]), metric)
    assert bool(torch.isnan(one.interval(one.values([Circuit.whole(one.wiring.graph)]))).all())


def test_minimality_is_the_loss_without_a_node(judged):
    circuit = scores_for(judged.wiring.graph).top(150)
    needed = judged.minimality(circuit)
    node = circuit.nodes[-1]
    smaller = circuit.without(node)
    assert not any(node == e.split("->")[0] for e in smaller.edges)
    assert not any(node == e.split("->")[1].split("<")[0] for e in smaller.edges)
    f = judged.faithfulness([circuit, smaller])
    assert needed[node] == pytest.approx(float(f[0] - f[1]), abs=1e-5)


# ACDC --------------------------------------------------------------------------------------------


def small_judge(metric_name: str) -> Judge:
    """A model of one layer, 23 edges: the plain loop takes a pass for each."""
    known = wired("sort_unique")
    pairs = known.pairs(n=3).encode(known.model)
    return Judge(Wiring(known.model), pairs, metric_named(metric_name))


@pytest.mark.parametrize("metric_name", ["logit_diff", "kl"])
def test_acdc_equals_the_plain_loop(metric_name):
    judge = small_judge(metric_name)
    graph, threshold = judge.wiring.graph, 0.05
    mask = graph.real.clone()

    def distance(mask):
        return float((judge.whole - judge.values([Circuit(graph, mask)])[0]).mean())

    now = distance(mask)
    for destination in reversed(range(len(graph.destinations))):
        for source in reversed(range(len(graph.sources))):
            if not mask[source, destination]:
                continue
            mask[source, destination] = False
            trial = distance(mask)
            if trial - now < threshold:
                now = trial
            else:
                mask[source, destination] = True
    assert acdc(judge, threshold).edges == Circuit(graph, mask).pruned().edges


def test_acdc_scores_rise_with_what_an_edge_survives():
    judge = small_judge("logit_diff")
    scores = acdc_scores(judge, (0.01, 0.1))
    assert set(scores.values.unique().tolist()) <= {0.0, *torch.tensor([0.01, 0.1]).tolist()}
    with pytest.raises(UsageError):
        acdc(judge, -1.0)


# MIB ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "pt"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_files_of_mib_come_back(family, ending, wiring_of, tmp_path):
    wiring = wiring_of(family)
    scores = scores_for(wiring.graph)
    circuit = scores.top(80)
    path = write_mib(wiring.model, scores, circuit, tmp_path / f"circuit.{ending}")
    again, same = read_mib(wiring.model, path)
    torch.testing.assert_close(again.values, scores.values, atol=1e-6, rtol=1e-6)
    assert same.edges == circuit.edges


def test_mib_names_every_query_heads_keys(wiring_of, tmp_path):
    wiring = wiring_of("llama")
    scores = scores_for(wiring.graph)
    path = write_mib(wiring.model, scores, None, tmp_path / "c.json")
    content = json.loads(path.read_text())
    heads, layers = 4, 3
    sources = 1 + layers * (heads + 1)
    edges = sum(
        (3 * heads + 1) * (1 + layer * (heads + 1)) + heads for layer in range(layers)
    ) + sources  # fmt: skip
    assert len(content["edges"]) == edges
    shares = [content["edges"][f"input->a0.h{h}<k>"]["score"] for h in (0, 1)]
    assert sum(shares) == pytest.approx(scores["input->a0.h0<k>"], abs=1e-6)


def test_files_for_another_model_are_refused(wiring_of, tmp_path):
    gpt2, llama = wiring_of("gpt2"), wiring_of("llama")
    path = write_mib(gpt2.model, scores_for(gpt2.graph), None, tmp_path / "c.json")
    content = json.loads(path.read_text())
    content["cfg"]["n_layers"] = 12
    path.write_text(json.dumps(content))
    with pytest.raises(FileProblem, match="another architecture"):
        read_mib(llama.model, path)
    path.write_text("{}")
    with pytest.raises(FileProblem, match="lacks cfg, edges"):
        read_mib(llama.model, path)
    with pytest.raises(FileProblem, match="cannot be read"):
        read_mib(llama.model, tmp_path / "none.json")
    with pytest.raises(NotOffered, match="no place"):
        write_mib(wiring_of("mamba").model, scores_for(wiring_of("mamba").graph), None, path)


def test_a_pt_file_runs_no_code(wiring_of, tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"cfg": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(FileProblem):
        read_mib(wiring_of("gpt2").model, tmp_path / "bad.pt")
