"""Component roles: planted heads, hooks written by hand, and what must not be found in noise."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from planted import pairs_of, planted
from random_models import random_model
from scipy import stats
from torch import Tensor

import underhood as uh
from underhood.core.errors import NotOffered, OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.methods.locate._roles import matched, parts_of, permuted, selectivity
from underhood.methods.locate._welch import compared
from underhood.methods.locate.activation_patching import activation_patching
from underhood.methods.locate.component_roles import component_roles
from underhood.organisms import organism
from underhood.view import View


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def task(name: str, n: int = 24, seed: int = 0) -> Pairs:
    return organism("village").pairs(name, n, seed)


def random_pairs(seed: int, n: int = 8) -> Pairs:
    rng = np.random.default_rng(seed)
    rows = rng.integers(10, 60, (n, 5))
    clean = [" ".join(f"w{w}" for w in row) for row in rows]
    rows[:, 2] = (rows[:, 2] - 9) % 50 + 10
    contrast = [" ".join(f"w{w}" for w in row) for row in rows]
    return Pairs(clean, contrast, ["w30"] * n, ["w31"] * n)


# Known answers -----------------------------------------------------------------------------------


def test_two_planted_heads_make_a_diagonal_table() -> None:
    labels = {"w10": {0: 1.0}, "w11": {0: -1.0}, "w12": {1: 1.0}, "w13": {1: -1.0}}
    model = planted([(0, 1, 0), (2, 2, 1)], labels)
    found = component_roles(
        model, pairs_of(["w10", "w11"], 24), other=pairs_of(["w12", "w13"], 24, seed=1),
        abilities=("one", "two"), size=2, draws=5,
    )  # fmt: skip
    loss = found["loss"].values
    # Alone, each head is all of its ability: with its mean the metric is halfway to the contrast.
    expected = np.zeros_like(loss)
    expected[0, 0, 1] = expected[1, 2, 2] = 0.5
    assert np.abs(loss - expected).max() < 0.02
    member = np.full(loss.shape[1:], -1)
    member[0, 1], member[2, 2] = 0, 1
    assert (found["circuit"].values == member).all()
    assert np.abs(found["joint"].values - np.eye(2) / 2).max() < 0.05
    assert np.abs(found["random"].values).max() < 1e-6
    assert (found["accuracy"].values.diagonal() < 0.8).all()
    assert (found["clean_accuracy"].values == 1).all()
    assert found["selectivity"].values[0, 1] > 0.95 and found["selectivity"].values[2, 2] < -0.95
    assert found["p"].values[0, 1] < 0.01 and found["p_all"].values[2, 2] < 0.01
    assert found["p"].values[1, 1] == 1


def test_the_subject_head_of_the_town(town: Model) -> None:
    """One head of block 1 carries the subject's number; who gives to whom does not need it."""
    found = component_roles(
        town, task("agreement", 40), other=task("indirect_object", 40),
        abilities=("agreement", "names"),
    )  # fmt: skip
    assert found["circuit"].values[1, 3] == 0
    assert found["loss"].values[0, 1, 3] > 0.3 > 0.1 > abs(found["loss"].values[1, 1, 3])
    joint, random = found["joint"].values, found["random"].values
    assert (joint.diagonal() > 0.35).all() and np.abs([joint[0, 1], joint[1, 0]]).max() < 0.1
    assert (joint.diagonal() > random.diagonal()).all()
    assert found["accuracy"].values[0, 0] < 0.85
    assert found.provenance["chosen_on"] == found.provenance["tested_on"] == [20, 20]


def test_one_ability_against_itself_has_no_roles(town: Model) -> None:
    found = component_roles(town, task("capitals", 30), other=task("capitals", 30, 7))
    assert found["p_all"].values.min() > 0.05
    assert np.abs(found["loss"].values).max() > 0.3  # although there are losses


def test_neurons_by_their_activation(town: Model) -> None:
    found = component_roles(
        town, task("agreement"), other=task("indirect_object"), components="neuron",
        positions="last", size=30,
        draws=2,
    )  # fmt: skip
    assert found["t"].dims == ("layer", "neuron")
    halves = [task(name).split(0.5, 0)[0] for name in ("agreement", "indirect_object")]
    acts = [
        torch.cat([town.run(p.clean[0], record="mlp_post.3", at=-1)["mlp_post.3"][:, 0] for p in h])
        for h in halves
    ]
    mine: Any = stats.ttest_ind(acts[0].double(), acts[1].double(), equal_var=False)
    assert np.allclose(found["t"].values[3], mine.statistic, rtol=1e-3, atol=1e-4)
    assert np.allclose(
        found["difference"].values[3], (acts[0].mean(0) - acts[1].mean(0)), atol=1e-4
    )
    assert int((found["q"] <= 0.05).sum()) > 50 > 5 > float(found["found_by_chance"])
    assert [int((found["circuit"] == i).sum()) for i in (0, 1)] == [30, 30]
    noise = torch.randn(24, 500, generator=torch.Generator().manual_seed(0)).double()
    nothing = compared(noise[:12], noise[12:], limit=0.05, times=5, seed=0)
    assert int((nothing.q <= 0.05).sum()) <= 1 and nothing.by_chance <= 1


# Brute force -------------------------------------------------------------------------------------


def _blocks(model: Model) -> list[tuple[Any, Any]]:
    """The module before which heads are split, and the MLP, of every layer."""
    net: Any = model.module
    if hasattr(net, "transformer"):
        return [(block.attn.c_proj, block.mlp) for block in net.transformer.h]
    return [(block.self_attn.o_proj, block.mlp) for block in net.model.layers]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("components", ["head", "mlp"])
def test_it_equals_hooks_written_by_hand(family: str, components: Any) -> None:
    model = random_model(family)
    first, second = random_pairs(1), random_pairs(2)
    found = component_roles(model, first, other=second, components=components, draws=1)
    for number, pairs in enumerate((first, second)):
        encoded = pairs.split(0.5, 0)[0].encode(model)
        right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])

        def score(ids: Tensor, right: int = right, wrong: int = wrong) -> float:
            with torch.no_grad():
                logits = model.module(input_ids=ids).logits[:, -1]
            return float((logits[:, right] - logits[:, wrong]).mean())

        clean, contrast = score(encoded.clean.ids), score(encoded.contrast.ids)
        for layer, (split, mlp) in enumerate(_blocks(model)):
            kept: list[Tensor] = []
            if components == "head":
                handle = split.register_forward_pre_hook(lambda _m, a, k=kept: k.append(a[0]))
            else:
                handle = mlp.register_forward_hook(lambda _m, _a, out, k=kept: k.append(out))
            for ids in (encoded.clean.ids, encoded.contrast.ids):
                score(ids)
            handle.remove()
            mean = torch.cat(kept)[:, 1:].flatten(0, 1).mean(0)
            for unit in range(model.n_heads if components == "head" else 1):
                size = len(mean) // model.n_heads if components == "head" else len(mean)
                part = slice(unit * size, (unit + 1) * size)

                def write(h: Tensor, mean: Tensor = mean, part: slice = part) -> Tensor:
                    h = h.clone()
                    h[:, 1:, part] = mean[part]
                    return h

                if components == "head":
                    handle = split.register_forward_pre_hook(lambda _m, a: (write(a[0]), *a[1:]))
                else:
                    handle = mlp.register_forward_hook(lambda _m, _a, out: write(out))
                expected = (clean - score(encoded.clean.ids)) / (clean - contrast)
                handle.remove()
                place = (number, layer, unit)[: found["loss"].ndim]
                assert abs(float(found["loss"].values[place]) - expected) < 2e-4 * (
                    1 + abs(expected)
                )


def test_resampling_is_activation_patching(town: Model) -> None:
    first, second = task("agreement", 12), task("indirect_object", 12)
    found = component_roles(town, first, other=second, value="resample", draws=1)
    for number, pairs in enumerate((first, second)):
        patched = activation_patching(
            town, pairs.split(0.5, 0)[0], sites="z", direction="noise", positions="all",
            control=False,
        )  # fmt: skip
        assert np.allclose(found["loss"].values[number], patched["effect"], atol=1e-5)
        assert np.allclose(found["sem"].values[number], patched["sem"], atol=1e-5)


# The controls ------------------------------------------------------------------------------------


def test_permuted_labels_against_all_of_them() -> None:
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 8, generator=make, dtype=torch.float64)
    rows[0, :4] += 3
    found = permuted(rows[:, :4], rows[:, 4:], times=4000, seed=0)
    seen = (rows[:, :4].mean(1) - rows[:, 4:].mean(1)).abs()
    every = []
    for chosen in combinations(range(8), 4):
        rest = [i for i in range(8) if i not in chosen]
        every.append((rows[:, list(chosen)].mean(1) - rows[:, rest].mean(1)).abs())
    chance = torch.stack(every, 1)
    exact = (chance >= seen[:, None] * (1 - 1e-9)).double().mean(1)
    top = (chance.amax(0)[None] >= seen[:, None] * (1 - 1e-9)).double().mean(1)
    assert torch.allclose(found.p, exact, atol=0.03)
    assert torch.allclose(found.p_all, top, atol=0.03)
    assert found.p[0] < 0.05 and (found.p_all >= found.p).all()


def test_selectivity_of_nothing_is_nothing() -> None:
    got = selectivity(torch.tensor([1.0, 0.0, 1e-4, 0.5]), torch.tensor([0.0, 0.0, 0.0, 0.5]))
    assert torch.allclose(got, torch.tensor([0.9901, 0.0, 0.0099, 0.0]), atol=1e-3)


def test_random_sets_match_in_size_and_layers(town: Model) -> None:
    heads = parts_of(town, "head")
    chosen = [1, 2, 7]
    sets, away = matched(heads, chosen, draws=15, seed=0)
    assert len(sets) == 15 and away == 0
    for one in sets:
        assert sorted(heads[i].layer for i in one) == [0, 0, 1] and one != chosen
        assert len(set(one)) == 3
    assert len({tuple(one) for one in sets}) == 15
    assert matched(heads, chosen, draws=15, seed=0) == (sets, 0)
    # Four heads in a layer, one chosen: three others, and no more are invented.
    assert matched(heads, [5], draws=20, seed=0)[0] == [[4], [6], [7]]
    # A whole layer has nothing like it in the same layer.
    layers = parts_of(town, "layer")
    assert matched(layers, [1], draws=20, seed=0) == ([[0], [2], [3]], 1)
    assert matched(layers, [0, 1, 2], draws=5, seed=0) == ([], 0)


def test_the_batch_size_does_not_matter(town: Model) -> None:
    first, second = task("agreement", 8), task("indirect_object", 8)
    whole = component_roles(town, first, other=second, draws=1)
    part = component_roles(town, first, other=second, draws=1, batch_size=3)
    for name in ("loss", "sem", "joint", "random", "accuracy"):
        assert np.allclose(whole[name], part[name], atol=2e-5, equal_nan=True), name


# What comes back ---------------------------------------------------------------------------------


def test_result_and_view(town: Model, tmp_path: Any) -> None:
    options: dict[str, Any] = {"other": task("indirect_object", 8), "draws": 1}
    for components in ("head", "layer", "mlp"):
        found = component_roles(town, task("agreement", 8), components=components, **options)
        assert found.view.kind == "group"
        assert View.from_json(found.view.to_json()) == found.view
        assert "other=" in found.provenance["call"]
        loaded = type(found).load(found.save(tmp_path / f"{components}.json"))
        assert loaded.data.equals(found.data)
        assert "held-out" in found.view.html() or "nothing to test" in found.view.html()
    zero = component_roles(town, task("agreement", 8), value="zero", positions="last", **options)
    assert np.abs(zero["loss"]).max() > 0.1


def test_refusals(town: Model) -> None:
    first, second = task("agreement", 8), task("indirect_object", 8)
    with pytest.raises(UsageError, match="two names"):
        component_roles(town, first, other=second, abilities=("a", "a"))
    with pytest.raises(PairError, match="too few rows"):
        component_roles(town, first, other=second[:2])
    with pytest.raises(PairError, match="one row has no spread"):
        component_roles(town, first, other=second, held_out=0.9)
    with pytest.raises(OutOfRange):
        component_roles(town, first, other=second, draws=0)
    with pytest.raises(PairError, match="needs"):
        component_roles(town, Pairs(first.clean, first.contrast), other=second)
    with pytest.raises(NotOffered):
        component_roles(random_model("mamba"), random_pairs(1), other=random_pairs(2))
