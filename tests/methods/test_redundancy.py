"""Redundancy: wired backups, planted set functions, brute force with cut edges, none in noise."""

from collections.abc import Collection, Iterable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor

import underhood as uh
from underhood.circuits import Circuit, Judge, Wiring
from underhood.core.errors import NotOffered, OutOfRange, PairError
from underhood.data import EncodedPairs, Pairs, metric_named
from underhood.methods.locate._cuts import Cuts, nodes_of
from underhood.methods.locate._stand_ins import Rule, Search, extra, random_sets
from underhood.methods.locate.redundancy import redundancy
from underhood.organisms import wired
from underhood.view import Result

DIFF = metric_named("logit_diff")


def random_pairs(seed: int = 0, n: int = 6, length: int = 6) -> Pairs:
    rng = np.random.default_rng(seed)
    rows = rng.integers(10, 60, (n, length))
    clean = [" ".join(f"w{w}" for w in row) for row in rows]
    rows[:, 2] = (rows[:, 2] - 9) % 50 + 10
    contrast = [" ".join(f"w{w}" for w in row) for row in rows]
    return Pairs(clean, contrast, ["w30"] * n, ["w31"] * n)


def names(result: Result) -> list[str]:
    return [str(name) for name in result["circuit"].values]


def said(result: Result) -> str:
    views: Any = result.view
    return " ".join(views.views[0].items)


# Known answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "all"])
def test_a_backup_is_found_from_the_head_that_it_backs_up(kind: Any) -> None:
    organism = wired("backup")
    found = redundancy(organism.model, organism.pairs(n=16), nodes=kind)
    assert names(found) == ["a0.h0+a1.h3"]
    joint = float(found["joint"][0])
    assert abs(joint - organism.joint["a0.h0+a1.h3"]) < 0.01
    own = found["own"].isel(circuit=0)
    assert abs(float(own.sel(node="a0.h0")) - organism.joint["a0.h0"]) < 0.05
    assert abs(float(own.sel(node="a1.h3"))) < 1e-3
    alone = float(own.sum())
    assert abs(float(found["interaction"][0]) - (joint - alone)) < 1e-9
    assert bool(found["held"][0]) and np.abs(found["control_interaction"].values).max() < 0.01
    assert float(found["interaction_low"][0]) > 0.7
    assert "a0.h0 and a1.h3 back each other up" in said(found)


@pytest.mark.parametrize("top", [1, 8])
def test_heads_that_show_nothing_alone_are_found_by_groups(top: int) -> None:
    """With the strongest single head alone (any of eight zeros) there is nothing to go on from."""
    organism = wired("redundant")
    found = redundancy(organism.model, organism.pairs(n=16), top=top)
    assert np.abs(found["single"].values).max() < 1e-3
    truth = {name: value for name, value in organism.joint.items() if name.count("+") == 1}
    assert set(names(found)) == set(truth)
    assert np.abs(found["joint"].values - 1).max() < 0.01
    assert found["held"].values.all()
    assert "a0.h0, a0.h1 and a0.h3 stand in for one another" in said(found)
    assert "any two together 1.00" in said(found)


@pytest.mark.parametrize("name", ["induction", "xor", "linear"])
def test_nothing_is_found_where_nothing_backs_up(name: str) -> None:
    organism = wired(name)
    found = redundancy(organism.model, organism.pairs(n=16), nodes="all")
    assert names(found) == [] and "No nodes stand in for each other" in said(found)
    views: Any = found.view
    assert np.nanmax(np.array(views.views[-1].values, dtype=float)) < 0.1


def test_parts_in_series_have_a_negative_interaction() -> None:
    organism = wired("induction")
    found = redundancy(organism.model, organism.pairs(n=16))
    alone = float(found["single"].sel(node="a0.h2"))
    later = float(found["conditional"].sel(part="a1.h1", node="a0.h2"))
    assert alone > 0.3 and abs(later) < 1e-3


def test_the_late_heads_of_the_town_are_backups_only_in_part() -> None:
    from underhood.organisms import organism

    found = redundancy(uh.load(), organism("town").pairs("induction", 6), top=3, draws=5)
    assert all(set(name.split("+")) <= {f"a1.h{h}" for h in range(4)} for name in names(found))
    assert "in part back each other up" in said(found)


# The search --------------------------------------------------------------------------------------


class Planted(Cuts):
    """A set function instead of a model."""

    def __init__(self, worth: dict[int, float], sets: dict[frozenset[int], float]) -> None:
        self.worth, self.planted = worth, sets
        self._done: dict[frozenset[int], Tensor] = {frozenset(): torch.zeros(1)}

    def lost(self, sets: Iterable[Collection[int]]) -> Tensor:
        found = []
        for some in map(frozenset, sets):
            value = sum(self.worth.get(n, 0.0) for n in some)
            value += sum(v for s, v in self.planted.items() if s <= some)
            self._done[some] = torch.tensor([value], dtype=torch.float64)
            found.append(value)
        return torch.tensor(found, dtype=torch.float64)


def test_planted_sets_are_found_among_many_nodes() -> None:
    """A hidden pair, a hidden triple, a backup of a strong node, and two of them that need it."""
    planted = {
        frozenset([3, 17]): 0.5, frozenset([5, 40, 41]): 0.4, frozenset([0, 30]): 0.3,
        frozenset([1, 9, 22]): 0.3,
    }  # fmt: skip
    cuts = Planted({0: 0.4, 1: 0.3, 2: -0.2}, planted)
    search = Search(cuts, tuple(range(48)), Rule(3, 0.1, 4))
    assert set(search.run()) == set(planted)
    assert search.found[0] == frozenset([3, 17])
    # Of 17,296 triples and 1,128 pairs:
    assert cuts.sets < 1000
    assert search.bases == (0, 1, 2)


def test_a_member_against_the_answer_is_no_backup() -> None:
    """A head that works against what another writes stops doing so when that one is gone."""
    joint = {frozenset([0, 1]): 0.35}
    cuts = Planted({0: 0.5, 1: -0.3}, joint)  # together 0.55: interaction +0.35, nothing new
    assert float(extra(cuts, [frozenset([0, 1])])[0]) == pytest.approx(0.05)
    assert Search(cuts, (0, 1, 2, 3), Rule(4, 0.1, 3)).run() == []


def test_what_no_small_set_does_is_called_diffuse() -> None:
    planted = {frozenset(some): 0.05 for some in combinations(range(8), 6)}
    search = Search(Planted({}, planted), tuple(range(8)), Rule(2, 0.1, 3))
    assert search.run() == [] and search.diffuse >= 1


def test_random_sets_hold_nothing_found_and_are_unlike_each_other() -> None:
    avoid = [frozenset([0, 1])]
    drawn = random_sets(range(5), 2, avoid, draws=50, seed=0)
    assert set(drawn) == {frozenset(p) for p in combinations(range(5), 2)} - set(avoid)
    assert random_sets(range(2), 3, [], draws=5, seed=0) == []


# Ablations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3_next"])
def test_sets_equal_cut_edges(family: str) -> None:
    """A node ablated by an edit is a node whose outgoing edges are all cut."""
    model = random_model(family)
    wiring, pairs = Wiring(model), random_pairs().encode(model)
    nodes = nodes_of(wiring, "all")
    make = torch.Generator().manual_seed(1)
    sets = [torch.tensor(nodes)[torch.rand(len(nodes), generator=make) < p].tolist()
            for p in (0.1, 0.2, 0.4, 0.7, 1.1)]  # fmt: skip
    sets = [s for s in sets if s]
    for ablation in ("resample", "mean"):
        expected = _judged(wiring, pairs, ablation, sets)
        for size in (None, 4):
            cuts = Cuts(wiring, pairs, DIFF, ablation, size)
            torch.testing.assert_close(cuts.clean - cuts.drops(sets), expected, atol=1e-5, rtol=0)
        assert float((cuts.clean - expected).abs().max()) > 0.05


def _judged(wiring: Wiring, pairs: EncodedPairs, ablation: str, sets: list[list[int]]) -> Tensor:
    masks = []
    for some in sets:
        mask = wiring.graph.real.clone()
        mask[some] = False
        masks.append(Circuit(wiring.graph, mask))
    return Judge(wiring, pairs, DIFF, ablation).values(masks)


def test_prompts_of_unlike_length_keep_their_own_positions() -> None:
    """Padded together they give what each gives alone."""
    model = random_model("llama")
    parts = [random_pairs(n=2, length=length) for length in (4, 7)]
    both = Pairs(*(sum((list(getattr(p, n)) for p in parts), [])
                   for n in ("clean", "contrast", "answers", "wrong")))  # fmt: skip
    wiring = Wiring(model)
    sets = [[1], [1, 6], [2, 5, 7]]
    alone = [Cuts(wiring, p.encode(model), DIFF).drops(sets) for p in parts]
    together = Cuts(wiring, both.encode(model), DIFF).drops(sets)
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=0)


def test_numbers_do_not_depend_on_the_batch_size() -> None:
    organism = wired("backup")
    one, other = (
        redundancy(organism.model, organism.pairs(n=6), batch_size=size, draws=5)
        for size in (None, 5)
    )
    for name in ("single", "conditional", "joint", "interaction", "control_interaction"):
        assert np.allclose(one[name].values, other[name].values, atol=1e-5, equal_nan=True), name


# Refusals, and what is handed out ----------------------------------------------------------------


def test_refusals() -> None:
    organism = wired("backup")
    pairs = organism.pairs(n=4)
    for wrong in ({"top": 0}, {"largest": 1}, {"draws": 0}, {"threshold": 0.0}, {"held_out": 1.0}):
        with pytest.raises(OutOfRange):
            redundancy(organism.model, pairs, **wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotOffered, match="no heads"):
        model = random_model("mamba")
        redundancy(model, random_pairs())
    same = Pairs(pairs.clean, pairs.contrast, pairs.answers)
    with pytest.raises(PairError):
        redundancy(organism.model, same)


def test_one_prompt_says_that_it_is_one_and_the_result_can_be_kept(tmp_path: Any) -> None:
    organism = wired("backup")
    found = redundancy(organism.model, organism.pairs(n=1), draws=3)
    assert "Found and measured on the same prompt" in said(found)
    assert np.isnan(found["interaction_low"].values).all()
    again = Result.load(found.save(tmp_path / "found"))
    assert again.data.equals(found.data) and again.provenance["sets"] > 8
    empty = redundancy(wired("induction").model, wired("induction").pairs(n=4), draws=3)
    assert Result.load(empty.save(tmp_path / "none"))["circuit"].size == 0
