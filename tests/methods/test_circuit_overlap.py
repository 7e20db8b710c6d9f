"""Circuit overlap: planted circuits that share one head, chance by counting, a repair by hand."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from planted import pairs_of, planted
from random_models import random_model

import underhood as uh
from underhood.circuits import Circuit, Graph, Scores
from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.methods.locate._overlap import correlation, held, permuted, shared
from underhood.methods.locate._repair import same_layers
from underhood.methods.locate.circuit_overlap import circuit_overlap, repair_plan
from underhood.organisms import organism
from underhood.organisms.wired_build import build
from underhood.organisms.wired_heads import text_board
from underhood.view import Result


def said(result: Result) -> str:
    views: Any = result.view
    return " ".join(views.views[0].items)


def town(task: str, n: int) -> Pairs:
    return organism("town").pairs(task, n)


# Overlap -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_of_three() -> Result:
    """Three heads; the first task needs heads X and Y, the second Y and Z."""
    labels = {
        "w10": {0: 1.0, 1: 1.0}, "w11": {0: -1.0, 1: -1.0},
        "w12": {1: 1.0, 2: 1.0}, "w13": {1: -1.0, 2: -1.0},
    }  # fmt: skip
    model = planted([(0, 1, 0), (1, 2, 1), (2, 3, 2)], labels)
    return circuit_overlap(
        model, pairs_of(["w10", "w11"], 12), other=pairs_of(["w12", "w13"], 12, seed=1),
        tasks=("one", "two"), by="eap", target=0.98, draws=4,
    )  # fmt: skip


def test_two_of_three_heads(two_of_three: Result) -> None:
    found = two_of_three
    heads = found.data.sel(part="heads")
    assert heads["size"].values.tolist() == [2, 2] and int(heads["shared"]) == 1
    assert float(heads["iou"]) == pytest.approx(1 / 3)
    assert heads["recall"].values.tolist() == [0.5, 0.5] and float(heads["smaller"]) == 0.5
    edges = found.data.sel(part="edges")
    # Two in and two out, and one between the heads: what the first writes enters its norm.
    assert edges["size"].values.tolist() == [5, 5] and int(edges["shared"]) == 2
    assert float(edges["iou"]) == pytest.approx(2 / 8)
    assert found["iou_within"].values.min() == 1  # the same circuit from either half
    own, cross = np.diag(found["f"].values), found["f"].values[[0, 1], [1, 0]]
    assert np.abs(own - 1).max() < 0.01
    assert ((cross > 0.3) & (cross < 0.7)).all()  # the shared head is a part of each task
    assert found["f_random"].values.mean() < 0.2
    assert "share 1 of the 3 heads in either circuit (33%" in said(found)


def test_edges_are_those_of_the_planted_heads(two_of_three: Result) -> None:
    names = two_of_three["name"].values
    found = [set(names[row].tolist()) for row in two_of_three["in_circuit"].values]
    both = found[0] & found[1]
    assert both == {"input->a1.h1<v>", "a1.h2->logits"}  # h1<v>: the key/value head of h2
    assert {name.split("->")[0] for name in found[0]} == {"input", "a0.h1", "a1.h2"}
    assert {name.split("->")[0] for name in found[1]} == {"input", "a1.h2", "a2.h3"}


def test_one_task_twice_shares_everything() -> None:
    pairs = town("agreement", 8)
    found = circuit_overlap(uh.load(), pairs, other=pairs, by="eap", draws=2, repair=0)
    assert (found["iou"].values == 1).all() and (found["recall"].values == 1).all()
    assert float(found["pearson"]) == pytest.approx(1) == float(found["spearman"])
    assert np.allclose(found["f"].values[0], found["f"].values[1])
    assert float(found["p"].sel(part="edges")) < 1e-6
    assert float(found["iou_random"].sel(part="edges").max()) < 0.5


def test_the_chance_of_an_overlap_is_counted() -> None:
    graph = Graph.of(random_model("gpt2"))
    heads = ["a0.h0", "a0.h1", "a1.h2", "a2.h0"]

    def of(names: list[str]) -> Circuit:
        return Circuit.of(graph, [e for n in names for e in (f"input->{n}<v>", f"{n}->logits")])

    found = shared(of(heads[:3]), of(heads[1:]), "heads")
    total = len(held(of(heads), "heads"))
    mine = {0, 1, 2}
    drawn = [len(mine & set(other)) for other in combinations(range(total), 3)]
    assert found.both == 2 and found.total == total
    assert found.p == pytest.approx(np.mean([n >= 2 for n in drawn]))
    empty = shared(of([]), of(heads), "heads")
    assert np.isnan(empty.recall[0]) and empty.recall[1] == 0 and empty.p == 1


def test_correlations() -> None:
    graph = Graph.of(random_model("gpt2"))
    make = torch.Generator().manual_seed(0)
    one, noise = (
        Scores(graph, torch.randn(graph.real.shape, generator=make), {}) for _ in range(2)
    )
    a, b = (s.values[graph.real].numpy().astype(float) for s in (one, noise))
    assert correlation(one, noise)[0] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    opposite = Scores(graph, -2 * one.values, {})
    assert correlation(one, opposite) == pytest.approx((-1, 1))
    assert permuted(one, noise, times=100, seed=0) == pytest.approx(2 / len(a) ** 0.5, rel=0.3)


# Repair ------------------------------------------------------------------------------------------

WORDS = tuple("abcdefgh")
INHIBITOR, MOVER = "a0.h1", "a1.h2"


def inhibited() -> Model:
    """Prompts `x y ask`: y is right. a0.h1 finds x, and a1.h2 copies the word that a0.h1 did not.

    After `easy` a0.h1 looks at x; after `hard` at both words evenly, so that a1.h2 follows a bias
    towards the first word and is wrong.
    """
    words = (*WORDS, "easy", "hard")
    n, size = len(WORDS), len(words)
    board = text_board(words, {"stop": n, "out": n}, layers=2, d_head=24)
    context = board.size.context
    ask, places = torch.zeros(size, 2), torch.zeros(context, 2)
    ask[n, 0] = ask[n + 1, 1] = 1.0
    places[1, 0], places[[1, 2], 1] = 30.0, 30.0
    board.look(0, 1, {"tok": ask}, {"pos": places})
    board.move(0, 1, {"tok": torch.eye(size)[:, :n]}, {"stop": torch.eye(n)})
    asks, options = torch.zeros(size, 1 + n), torch.zeros(context, 1 + n)
    asks[n:, 0] = 1.0
    options[1, 0], options[2, 0] = 30.8, 30.0
    stop, token = torch.zeros(n, 1 + n), torch.zeros(size, 1 + n)
    stop[:, 1:] = -8 * torch.eye(n)
    token[:n, 1:] = torch.eye(n)
    board.look(1, 2, {"tok": asks, "stop": stop}, {"pos": options, "tok": token})
    board.move(1, 2, {"tok": torch.eye(size)[:, :n]}, {"out": torch.eye(n)})
    board.answer("out", WORDS, 8.0)
    board.distract(seed=3)
    return build(board, "inhibited")


def asked(ask: str, n: int = 8) -> Pairs:
    drawn = [(WORDS[i % 8], WORDS[(i + 1 + i // 3) % 8]) for i in range(n)]
    return Pairs(
        [f"{x} {y} {ask}" for x, y in drawn], [f"{y} {x} {ask}" for x, y in drawn],
        [y for _, y in drawn], [x for x, _ in drawn],
    )  # fmt: skip


@pytest.fixture(scope="module")
def repaired() -> Result:
    return circuit_overlap(
        inhibited(), asked("easy", 4), other=asked("hard", 4), tasks=("easy", "hard"),
        by="exact", draws=3,
    )  # fmt: skip


def test_the_under_used_head_is_found_and_pushed(repaired: Result) -> None:
    found = repaired
    assert found.provenance["repair"]["heads"]["hard"] == [INHIBITOR]
    hard = found.data.sel(task="hard")
    assert float(hard["accuracy"]) == 0 and float(hard["accuracy_after"]) == 1
    assert float(hard["before"]) < 0 < float(hard["after"])
    # Random heads of the same layer change nothing.
    assert np.allclose(hard["random_after"].values, float(hard["before"]), atol=1e-3)
    assert (hard["random_accuracy"].values == 0).all()
    # The mover that follows turns to the right word, as in the easy task.
    assert float(hard["movers"]) < 0.4 and float(hard["movers_after"]) > 0.99
    assert "hard goes from" in said(found) and "it helps" in said(found)


def test_the_plan_repairs_other_prompts_and_only_in_the_right_role(tmp_path: Any) -> None:
    model, pairs = inhibited(), asked("hard", 5)
    ids = pairs.encode(model).answers[:, 0]
    plan = repair_plan(model, pairs, [INHIBITOR])
    plan.save(tmp_path / "plan")
    again = uh.Plan.load(tmp_path / "plan.json")
    for edits, right in ((None, 0), (plan, 5), (again, 5)):
        top = model.run(list(pairs.clean), edits=edits).last_logits.argmax(1)
        assert int((top == ids).sum()) == right
    wrong = repair_plan(model, pairs, [MOVER])  # a head that copies, told to look at the wrong word
    assert int((model.run(list(pairs.clean), edits=wrong).last_logits.argmax(1) == ids).sum()) == 0
    copied = repair_plan(model, pairs, [MOVER], push="answer")
    assert int((model.run(list(pairs.clean), edits=copied).last_logits.argmax(1) == ids).sum()) == 5


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
def test_pushed_heads_look_evenly_at_the_words_and_nowhere_else(family: str) -> None:
    model = random_model(family)
    pairs = Pairs(
        ["w20 w31 w22 w31 w23", "w31 w20 w21"], ["w20 w32 w22 w32 w23", "w32 w20 w21"],
        ["w30", "w30"], ["w31", "w31"],
    )  # fmt: skip
    plan = repair_plan(model, pairs, ["a1.h0", "a1.h2"])
    start = 0 if model.tokens("w20").ids.shape[1] == 1 else 1
    for padding in ("left", "right"):
        run = model.run(list(pairs.clean), edits=plan, record="pattern.1", padding=padding)
        tokens = run.tokens
        assert tokens is not None
        for row, spots in enumerate(([1, 3], [0])):
            own = tokens.mask[row].nonzero()[:, 0]
            seen = run["pattern", 1][row, [0, 2], own[-1]][:, own]
            expected = torch.zeros(len(own))
            expected[[start + spot for spot in spots]] = 1 / len(spots)
            torch.testing.assert_close(seen, expected.expand(2, -1), atol=1e-5, rtol=0)
        plain = model.run(list(pairs.clean), record="pattern.1", padding=padding)
        same = (run["pattern", 1][:, [1, 3]] - plain["pattern", 1][:, [1, 3]]).abs().max()
        assert float(same) < 1e-5


def test_scaling_needs_no_words() -> None:
    pairs, other = town("capitals", 4), town("agreement", 4)
    unsaid = circuit_overlap(uh.load(), pairs, other=other, by="eap", edges=60, draws=1)
    assert int(unsaid["rows"].sel(task="first")) == 0 and np.isnan(unsaid["after"].values[0])
    assert "No prompt of first holds the words" in said(unsaid)
    scaled = circuit_overlap(
        uh.load(), pairs, other=other, by="eap", edges=60, draws=1, push="scale"
    )
    assert (scaled["rows"].values == 2).all() and not np.isnan(scaled["random_after"].values).any()
    heads = scaled.provenance["repair"]["heads"]["first"]
    plan = repair_plan(uh.load(), pairs, heads, push="scale")
    assert [edit.site.name for edit in plan] == ["z"] * len(heads)


def test_random_heads_are_others_of_the_same_layers() -> None:
    everything = [(layer, head) for layer in range(3) for head in range(4)]
    pushed = [(0, 1), (2, 0), (2, 3)]
    drawn = same_layers(pushed, everything, draws=8, seed=0)
    assert len({tuple(sorted(some)) for some in drawn}) == 3
    for some in drawn:
        assert sorted(layer for layer, _ in some) == [0, 2, 2]
        assert not set(some) & set(pushed) and len(set(some)) == 3
    assert same_layers(everything, everything, draws=2, seed=0) == []


# Refusals, and what is handed out ----------------------------------------------------------------


def test_numbers_do_not_depend_on_the_batch_size() -> None:
    one, other = (
        circuit_overlap(
            inhibited(),
            asked("easy", 4),
            other=asked("hard", 4),
            by="eap",
            draws=1,
            batch_size=size,
        )  # fmt: skip
        for size in (None, 3)
    )
    for name in ("iou", "f", "f_random", "before", "after", "use"):
        assert np.allclose(one[name].values, other[name].values, atol=1e-4, equal_nan=True), name


def test_refusals() -> None:
    model, pairs = inhibited(), asked("easy", 4)
    for wrong in ({"repair": -1}, {"draws": 0}, {"held_out": 1.0}, {"factor": 0.0}):
        with pytest.raises(OutOfRange):
            circuit_overlap(model, pairs, other=pairs, **wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="two names"):
        circuit_overlap(model, pairs, other=pairs, tasks=("a", "a"))
    with pytest.raises(UsageError, match="names no head"):
        repair_plan(model, pairs, ["m1"])
    with pytest.raises(UsageError, match="none of these prompts"):
        repair_plan(uh.load(), town("capitals", 2), ["a1.h0"])
    with pytest.raises(NotOffered):
        circuit_overlap(random_model("bert"), pairs, other=pairs)


def test_the_result_can_be_kept(repaired: Result, tmp_path: Any) -> None:
    again = Result.load(repaired.save(tmp_path / "overlap"))
    assert again.data.equals(repaired.data)
    assert again.provenance["repair"] == repaired.provenance["repair"]
