"""Head subspaces: a planted plane, hooks written by hand, and the heads of the town."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from planted import pairs_of, planted
from random_models import random_model
from torch import Tensor

import underhood as uh
from underhood.core.errors import NotOffered, OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.core.names import head_named
from underhood.data import Pairs
from underhood.methods.locate._low_rank import LOG_ODDS, heads_named, random_spaces, spaces
from underhood.methods.locate.head_subspace import head_subspace
from underhood.methods.read.direct_attribution import direct_attribution
from underhood.organisms import organism
from underhood.view import View


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def task(name: str, n: int = 24, seed: int = 0, form: str = "") -> Pairs:
    drawn = organism("village").pairs(name, n * 20 if form else n, seed)
    return drawn[[i for i, text in enumerate(drawn.clean) if re.fullmatch(form or ".*", text)][:n]]


def asked_of(model: Model, n: int = 8) -> Pairs:
    """Random prompts whose answers are what a random model says; wrong is its least likely word."""
    rng = np.random.default_rng(3)
    rows = rng.integers(10, 60, (n, 6))
    clean = [" ".join(f"w{w}" for w in row) for row in rows]
    rows[:, 2] = (rows[:, 2] - 9) % 50 + 10
    contrast = [" ".join(f"w{w}" for w in row) for row in rows]
    logits = model.run(clean).last_logits
    return Pairs(clean, contrast, logits.argmax(-1).tolist(), logits.argmin(-1).tolist())


# Known answers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plane() -> Model:
    """One head carries four labels that lie in a plane."""
    labels = {"w10": (2.0, 0.0), "w11": (-2.0, 0.0), "w12": (0.0, 1.5), "w13": (0.0, -1.5)}
    return planted(
        [(1, 2, 0), (1, 2, 1)], {w: dict(enumerate(place)) for w, place in labels.items()}
    )


def test_two_planted_dimensions_are_enough_and_one_is_not(plane: Model) -> None:
    pairs = pairs_of(["w10", "w11", "w12", "w13"], 16)
    found = head_subspace(plane, pairs, ranks=(1, 2), draws=3)
    # Only this head writes: the output nodes are found, and none of the controls does as well.
    assert found["node"].values[0] == "a1.h2" and found["output"].values.sum() == 1
    assert abs(found["direct"].values[1:]).max() < 1e-6 < 0.5 < found["direct"].values[0]
    assert abs(float(found["left_random"])) < 0.3 and abs(float(found["left_total"]) - 1) < 0.01
    assert found["head"].values.tolist() == ["a1.h2"]
    values = found.data.sel(part="ov", head="a1.h2")
    assert abs(float(values["kept"].sel(rank=2)) - 1) < 1e-4
    assert float(values["kept"].sel(rank=1)) < 0.8
    assert float(values["needed"]) == 2
    assert float(values["accuracy"].sel(rank=2)) == 1 > float(values["accuracy"].sel(rank=1))
    assert float(values["kept_random"].sel(rank=2)) < 0.9
    assert abs(float(values["exchanged"].sel(rank=2)) - 1) < 1e-4
    assert abs(float(values["exchanged_rest"].sel(rank=2))) < 1e-4
    assert abs(float(values["exchanged_whole"]) - 1) < 1e-4
    # Its pattern never changes: the mean does as well, and nothing is claimed.
    assert found["kept"].sel(part="qk").isnull().all()
    assert "mean does as well" in found.view.html()


def test_keys_restrict_compression_to_the_labels(plane: Model) -> None:
    """The label stands at position 1, so its value there is all; elsewhere nothing happens."""
    pairs = pairs_of(["w10", "w11", "w12", "w13"], 16)
    there = head_subspace(plane, pairs, heads=("1.2",), ranks=(1, 2), keys=(1,), draws=1)
    assert abs(float(there["kept"].sel(part="ov", head="a1.h2", rank=2)) - 1) < 1e-4
    away = head_subspace(plane, pairs, heads=("a1.h2",), ranks=(1,), keys=(-1,), draws=1)
    assert away["kept"].sel(part="ov").isnull().all()
    assert (away["accuracy"] == 1).all()


def test_agreement_in_the_town_needs_few_dimensions(town: Model) -> None:
    found = head_subspace(
        town, task("agreement", 24, form=r"The \w+ near the \w+"), other=task("agreement", 12, 5),
        ranks=(3,),
    )  # fmt: skip
    assert found["node"].values[0] == "a1.h3" == found["head"].values[0]
    at = found.data.sel(head="a1.h3", rank=3)
    for part in ("qk", "ov"):
        assert float(at["kept"].sel(part=part)) > 0.85
        assert float(at["kept_random"].sel(part=part)) < 0.6
    # The number of the subject moves in the values and not in the pattern.
    assert abs(float(at["exchanged"].sel(part="qk"))) < 0.02
    assert (
        float(at["exchanged"].sel(part="ov")) > 0.5 > float(at["exchanged_random"].sel(part="ov"))
    )
    # Where to look is the same in other sentences; rank 3 was enough for it there as well.
    assert float(at["kept_other"].sel(part="qk")) > 0.85
    # A name is one of sixty: three dimensions of values cannot hold it.
    names = head_subspace(town, task("indirect_object", 20), heads=("0.1",), ranks=(4,), draws=1)
    at = names.data.sel(head="a0.h1", rank=4)
    assert float(at["kept"].sel(part="qk")) > 0.8 > 0.6 > float(at["kept"].sel(part="ov"))


# Brute force -------------------------------------------------------------------------------------


def test_compression_equals_hooks_written_by_hand() -> None:
    model = random_model("gpt2")
    pairs, layer, head = asked_of(model, 8), 1, 2
    found = head_subspace(
        model, pairs, heads=(f"{layer}.{head}",), ranks=(1, 3), draws=1, recover=0.5
    )
    choose, test = (half.encode(model) for half in pairs.split(0.5, 0))
    net: Any = model.module
    fused = net.transformer.h[layer].attn.c_attn
    width, size = net.config.n_embd, net.config.n_embd // net.config.n_head
    slots = [slice(k * width + head * size, k * width + (head + 1) * size) for k in range(3)]
    spots = [slice(-1, None), slice(1, None), slice(1, None)]  # query, key, value

    def odds(ids: Tensor) -> float:
        with torch.no_grad():
            logits = model.module(input_ids=ids).logits[:, -1]
        return float(LOG_ODDS(logits, test.answers, test.wrong).double().mean())

    seen: list[Tensor] = []
    handle = fused.register_forward_hook(lambda _m, _a, out: seen.append(out))
    for ids in (choose.clean.ids, choose.contrast.ids):
        with torch.no_grad():
            model.module(input_ids=ids)
    handle.remove()
    held = torch.cat(seen).double()

    def changed(rank: int, parts: list[int]) -> float:
        def write(_m: Any, _a: Any, out: Tensor) -> Tensor:
            out = out.clone()
            for part in parts:
                data = held[:, spots[part], slots[part]].flatten(0, 1)
                mean = data.mean(0)
                basis = torch.linalg.svd(data - mean, full_matrices=False)[2][:rank]
                mine = out[:, spots[part], slots[part]].double()
                new = mean + (mine - mean) @ basis.T @ basis
                out[:, spots[part], slots[part]] = new.float()
            return out

        handle = fused.register_forward_hook(write)
        try:
            return odds(test.clean.ids)
        finally:
            handle.remove()

    clean = odds(test.clean.ids)
    for part, which in (("qk", [0, 1]), ("ov", [2]), ("both", [0, 1, 2])):
        floor = changed(0, which)
        for rank in (1, 3):
            expected = (changed(rank, which) - floor) / (clean - floor)
            got = float(found["kept"].sel(part=part, rank=rank).isel(head=0))
            if abs(clean - floor) <= 0.02 * abs(clean):
                assert np.isnan(got)
            else:
                assert abs(got - expected) < 1e-3 * (1 + abs(expected)), (part, rank)
    assert abs(clean - changed(0, [2])) > 0.02 * abs(clean)  # something was compared


def test_output_nodes_equal_sums_made_by_hand() -> None:
    model = random_model("llama")
    pairs = asked_of(model, 8)
    found = head_subspace(model, pairs, ranks=(1,), draws=2, recover=0.5)
    choose, test = pairs.split(0.5, 0)
    direct = direct_attribution(model, choose)
    mine = dict(zip(direct["node"].values.tolist(), direct["contribution"].values, strict=True))
    for name, value in zip(found["node"].values.tolist(), found["direct"].values, strict=True):
        assert abs(mine[name] - value) < 1e-5
    assert np.allclose(np.abs(found["direct"]), np.sort(np.abs(found["direct"]))[::-1])
    assert abs(float(found["left"].values[-1]) - 1) < 1e-5

    def written(tokens: Any) -> Tensor:
        run = model.run(tokens, record=["head_out", "mlp_out"], at=-1)
        rows = []
        for name in found["node"].values.tolist():
            if name[0] == "m":
                rows.append(run["mlp_out", int(name[1:])][:, 0])
            else:
                layer, head = head_named(name)
                rows.append(run["head_out", layer][:, 0, head])
        return torch.stack(rows)

    encoded, chosen = test.encode(model), choose.encode(model)
    mean = torch.cat([written(chosen.clean), written(chosen.contrast)], 1).mean(1, keepdim=True)
    moved = written(encoded.clean) - mean
    run = model.run(encoded.clean, record=f"resid_post.{model.n_layers - 1}", at=-1)
    stream = run[f"resid_post.{model.n_layers - 1}"][:, 0]

    def diff(logits: Tensor) -> float:
        right, wrong = (logits.gather(1, ids).mean() for ids in (encoded.answers, encoded.wrong))
        return float(right - wrong)

    for step, size in enumerate(found["step"].values.tolist()):
        left = diff(model.unembed(stream - moved[size:].sum(0))) / diff(run.last_logits)
        assert abs(left - float(found["left"].values[step])) < 1e-4


# What must hold exactly --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_all_dimensions_are_everything(family: str) -> None:
    """Grouped heads, norms around attention, windows: full rank loses nothing, anywhere."""
    model = random_model(family)
    site = model.run("w10 w11", record="v.0")["v.0"]
    width = site.shape[-1]
    found = head_subspace(
        model, asked_of(model), heads=("0.1", "2.0"), ranks=(1, width), draws=1, recover=0.1
    )
    full = found.data.sel(rank=width)
    assert np.nanmax(np.abs(full["kept"].values - 1)) < 1e-3
    assert np.nanmax(np.abs(full["kept_random"].values - 1)) < 1e-3
    assert np.abs(full["exchanged"] - full["exchanged_whole"]).max() < 1e-4
    assert np.abs(full["exchanged_rest"]).max() < 1e-4
    assert (found["kept"].sel(rank=0).fillna(0) == 0).all()
    assert (found["exchanged"].sel(rank=0) == 0).all()
    assert found["head"].values.tolist() == ["a0.h1", "a2.h0", "together"]
    assert (found["spread"].sel(rank=width, part=["qk", "ov"]).values[:, :2] > 0.999).all()


def test_random_spaces_are_orthonormal_and_of_the_same_mean(town: Model) -> None:
    held = spaces(town, task("agreement", 4).encode(town), heads_named(town, ["1.3"]), keys=(),
                  batch_size=None)  # fmt: skip
    drawn = random_spaces(held, draw=0, seed=0)
    other = random_spaces(held, draw=1, seed=0)
    for site, space in drawn.items():
        eye = torch.eye(len(space.basis), dtype=torch.float64)
        assert torch.allclose(space.basis @ space.basis.T, eye, atol=1e-9)
        assert torch.allclose(held[site].basis @ held[site].basis.T, eye, atol=1e-9)
        assert torch.equal(space.mean, held[site].mean)
        assert not torch.allclose(space.basis, other[site].basis)


def test_the_batch_size_does_not_matter(town: Model) -> None:
    options: dict[str, Any] = {"heads": ("1.3", "1.0"), "ranks": (2,), "draws": 1}
    whole = head_subspace(town, task("agreement", 6), **options)
    part = head_subspace(town, task("agreement", 6), batch_size=2, **options)
    assert set(whole.data) == set(part.data)
    for name in whole.data:
        assert np.allclose(whole[str(name)], part[str(name)], atol=1e-4, equal_nan=True), name


def test_result_view_and_refusals(town: Model, tmp_path: Any) -> None:
    pairs = task("agreement", 8)
    found = head_subspace(town, pairs, other=task("agreement", 4, 3), ranks=(2,), draws=1)
    assert View.from_json(found.view.to_json()) == found.view
    loaded = type(found).load(found.save(tmp_path / "heads.json"))
    assert loaded.data.equals(found.data)
    assert "output nodes" in found.view.html().lower()
    with pytest.raises(UsageError, match="names no head"):
        head_subspace(town, pairs, heads=("1",))
    with pytest.raises(OutOfRange, match="no head"):
        head_subspace(town, pairs, heads=("1.9",))
    with pytest.raises(OutOfRange, match="cannot have rank"):
        head_subspace(town, pairs, heads=("1.3",), ranks=(99,))
    with pytest.raises(OutOfRange, match="share"):
        head_subspace(town, pairs, recover=1.5)
    with pytest.raises(PairError, match="too few"):
        head_subspace(town, pairs[:2])
    swapped = Pairs(pairs.clean, pairs.contrast, pairs.wrong, pairs.answers)
    with pytest.raises(PairError, match="does not prefer"):
        head_subspace(town, swapped)
    with pytest.raises(PairError, match="needs"):
        head_subspace(town, Pairs(pairs.clean, pairs.contrast))
    mamba = random_model("mamba")
    with pytest.raises(NotOffered):
        head_subspace(mamba, asked_of(mamba), heads=("0.0",))
