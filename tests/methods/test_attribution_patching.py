"""Attribution patching against exact patching where they must agree, and against differences."""

from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor, nn

import underhood as uh
from underhood.core.edit import Edit
from underhood.core.errors import NotFinite, NotOffered, OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.core.ops import add, patch
from underhood.core.site import Site
from underhood.core.tokens import Where
from underhood.data import Pairs, metric_named
from underhood.methods.locate._asked import Asked
from underhood.methods.locate._gradients import point_of, slopes
from underhood.methods.locate._patching import ExactPatching
from underhood.methods.locate._places import names_of
from underhood.methods.locate._saturation import key_moves, row_moves, softmaxes
from underhood.methods.locate._verify import missed_effect_bound, verify
from underhood.methods.locate.activation_patching import activation_patching
from underhood.methods.locate.attribution_patching import attribution_patching
from underhood.organisms import organism
from underhood.view import View

PAIR = Pairs.one("w20 w31 w12 w40 w55 w9", "w20 w31 w18 w40 w56 w9", "w30", "w33")


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def town_pairs(n: int, seed: int = 0) -> Pairs:
    return organism("village").pairs("indirect_object", n, seed)


class _Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def linear(*, sure: dict[int, float] | None = None) -> Model:
    """A GPT-2 without norms and nonlinearities; queries live only in the layers of `sure`."""
    net: Any = random_model("gpt2").module
    net.transformer.ln_f = _Same()
    for layer, block in enumerate(net.transformer.h):
        block.ln_1, block.ln_2, block.mlp.act = _Same(), _Same(), _Same()
        width = block.attn.c_attn.nx
        factor = (sure or {}).get(layer, 0.0)
        with torch.no_grad():
            block.attn.c_attn.weight[:, :width] *= factor
            block.attn.c_attn.bias[:width] *= factor
    return Model(net.double(), random_model("gpt2").tokenizer, name="linear")


def options(**more: Any) -> dict[str, Any]:
    return {"verify": 0, **more}


# Where the estimate must be exact ----------------------------------------------------------------


@pytest.mark.parametrize("sites", [("z", "v"), ("attn_out", "mlp_out", "resid_post")])
def test_it_is_exact_on_a_linear_network(sites: tuple[str, ...]) -> None:
    model = linear()
    exact = activation_patching(model, PAIR, sites=sites, control=False)
    assert np.abs(exact["effect"].values).max() > 0.05
    ways: list[dict[str, Any]] = [
        {"method": "atp", "grad_at": "clean"}, {"method": "atp", "grad_at": "corrupt"},
        {"method": "atp", "grad_at": "both"}, {"method": "ig", "steps": 1}, {"method": "atp*"},
    ]  # fmt: skip
    for way in ways:
        found = attribution_patching(model, PAIR, sites=sites, **way, **options())
        if way["method"] == "atp*":
            assert np.abs(found["signed"].values - exact["effect"].values).max() < 2e-5
            continue
        assert np.abs(found["effect"].values - exact["effect"].values).max() < 2e-5
        assert np.abs(found["raw"].values - exact["raw"].values).max() < 1e-5
        assert np.allclose(found["change"].sum("batch"), found["raw"], atol=1e-9)


@pytest.mark.parametrize("value", ["zero", "mean", "mean-position"])
@pytest.mark.parametrize("sites", [("z", "v"), ("attn_out", "mlp_out", "resid_post")])
def test_baselines_are_exact_on_a_linear_network(sites: tuple[str, ...], value: Any) -> None:
    """Clean gradient times (value - clean), the same numbers as noising with that value."""
    model = linear()
    pairs = Pairs(
        [PAIR.clean[0], "w21 w30 w14 w41 w52 w8"], [PAIR.contrast[0], "w21 w30 w19 w41 w50 w8"],
        [["w30"], ["w31"]], [["w33"], ["w35"]],
    )  # fmt: skip
    asked: dict[str, Any] = {"sites": sites, "direction": "noise", "value": value}
    exact = activation_patching(model, pairs, control=False, **asked)
    size = np.abs(exact["raw"].values).max()
    assert size > 0.05
    other: dict[str, Any] = asked | {"value": "resample"}
    resampled = activation_patching(model, pairs, control=False, **other)
    assert np.abs(exact["raw"].values - resampled["raw"].values).max() > 0.02
    ways: list[dict[str, Any]] = [
        {"method": "atp"}, {"method": "atp", "grad_at": "clean"}, {"method": "ig", "steps": 1},
    ]  # fmt: skip
    for way in ways:
        found = attribution_patching(model, pairs, **asked, **way, **options())
        assert np.abs(found["raw"].values - exact["raw"].values).max() < 2e-5 * size
        assert (found["skipped"].values == exact["skipped"].values).all()
        assert found.provenance["value"] == value
    found = attribution_patching(model, pairs, **asked, method="atp*", **options())
    assert np.abs(found["signed"].values - exact["effect"].values).max() < 2e-5 * size


def test_integrated_gradients_reach_a_baseline() -> None:
    """The rest of the model bends: the whole way from clean to zero is the exact effect."""
    model = random_model("gpt2")
    asked: dict[str, Any] = {
        "sites": "mlp_out", "direction": "noise", "value": "zero", "positions": "all",
        "batch_size": 64,
    }  # fmt: skip
    exact = activation_patching(model, PAIR, control=False, **asked)["raw"].values
    ways: list[dict[str, Any]] = [{"method": "atp"}, {"method": "ig", "steps": 50}]
    found = [attribution_patching(model, PAIR, **asked, **way, **options()) for way in ways]
    gaps = [np.abs(each["raw"].values - exact).max() for each in found]
    assert gaps[1] < 0.01 * np.abs(exact).max() < gaps[0]


def test_neurons_are_exact_too() -> None:
    model = linear()
    chosen: dict[str, Any] = {"sites": "mlp_post", "units": (0, 3, 5), "positions": "last"}
    exact = activation_patching(model, PAIR, control=False, **chosen)
    found = attribution_patching(model, PAIR, **chosen, **options())
    assert exact["effect"].dims == found["effect"].dims == ("layer", "neuron")
    assert np.abs(exact["raw"].values).max() > 1e-6
    assert np.abs(found["raw"].values - exact["raw"].values).max() < 1e-6


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_one_sign_for_both_directions(direction: Any) -> None:
    model = linear()
    found = attribution_patching(
        model, PAIR, sites="resid_pre", positions="all", direction=direction, **options()
    )
    assert np.abs(found["effect"].values - 1).max() < 1e-4
    assert np.allclose(found["raw"], float(found["clean"][0] - found["contrast"][0]), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_gradients_equal_finite_differences(family: str) -> None:
    model = random_model(family)
    if family == "gpt2":  # other families' norms compute in float32 whatever the model is in
        model.module.double()
    sites = {"gpt2": ("z", "mlp_post", "resid_mid", "q"), "mixtral": ("expert_out", "z")}[family]
    encoded = PAIR.encode(model)
    metric = metric_named("logit_diff")
    step = 1e-5 if family == "gpt2" else 1e-2
    for name in sites:
        asked = Asked(
            names_of(model, name, "each"), "denoise", metric, "each", "resample", 0, 0, None, "each"
        )
        ((_, block),) = ExactPatching(model, encoded, asked).blocks()
        grads = slopes(model, block, point_of(block, clean=True))
        make = torch.Generator().manual_seed(0)
        for place, grad in grads.items():
            unit = int(grad.abs().amax((0, 1, 3)).argmax())
            vector = torch.randn(grad.shape[-1], generator=make)
            vector = (vector / vector.norm()).to(model.dtype)
            for pos in (3, 5):
                ends = []
                if place.by_slot and not bool(block.source[place][0, pos, unit].any()):
                    continue  # the clean run does not choose this expert here
                for sign in (1, -1):
                    op = add(sign * step * vector)
                    edit = Edit(place.sites[unit], op, Where(pos))
                    logits = model.run(encoded.clean, edits=edit).last_logits
                    ends.append(float(metric(logits, encoded.answers, encoded.wrong)))
                slope = (ends[0] - ends[1]) / (2 * step)
                mine = float(grad[0, pos, unit].double() @ vector.double())
                close = 1e-5 if family == "gpt2" else 2e-3
                assert abs(slope - mine) < close * max(1.0, float(grad.norm())), (place.site, pos)


def test_integrated_gradients_are_complete() -> None:
    """Their sum over a layer is what exchanging the whole layer does."""
    model = random_model("llama")
    for site in ("z", "mlp_out", "mlp_post"):
        units = "whole" if site == "z" else "auto"
        exact = activation_patching(
            model, PAIR, sites=site, units=units, positions="all", control=False
        )
        found = attribution_patching(
            model, PAIR, sites=site, units="each" if site != "mlp_out" else "auto",
            method="ig", steps=40, **options(),
        )  # fmt: skip
        total = found["effect"].sum([d for d in found["effect"].dims if d != "layer"])
        assert np.abs(exact["effect"].values).max() > 0.05
        assert np.abs(total.values - exact["effect"].values).max() < 2e-3
    rough = attribution_patching(model, PAIR, sites="z", method="atp", **options())
    exact = activation_patching(
        model, PAIR, sites="z", units="whole", positions="all", control=False
    )
    assert np.abs(rough["effect"].sum(["head", "pos"]) - exact["effect"]).max() > 1e-2


# The QK fix --------------------------------------------------------------------------------------


def test_the_closed_form_of_the_key_fix() -> None:
    """Against softmaxes written out, masked, saturated and with a sink."""
    make = torch.Generator().manual_seed(0)
    for scale in (0.5, 30.0):
        for sink in (None, torch.randn(4, generator=make).double()):
            logits = torch.randn(4, 7, generator=make).double() * scale
            moved = torch.randn(4, 7, generator=make).double() * scale
            logits[1, 3:], moved[1, 3:] = -torch.inf, -torch.inf
            slope = torch.randn(4, 7, generator=make).double()

            def whole(rows: Tensor, sink: Tensor | None = sink) -> Tensor:
                full = rows if sink is None else torch.cat([rows, sink[:, None]], 1)
                return full.softmax(-1)[:, :7]

            expected = torch.zeros(4, 7).double()
            for key in range(7):
                changed = logits.clone()
                changed[:, key] = moved[:, key]
                expected[:, key] = ((whole(changed) - whole(logits)) * slope).sum(-1)
            found = key_moves(logits, moved, slope, sink)
            assert expected.abs().max() > 0.05
            assert (found - expected).abs().max() < 1e-9
            rows = ((whole(moved) - whole(logits)) * slope).sum(-1)
            assert (row_moves(logits, moved, slope, sink) - rows).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3", "gpt_oss", "qwen3"])
def test_recomputed_softmaxes_equal_patched_runs(family: str) -> None:
    """Rows with another query, columns with another key: as the model itself computes them."""
    model = random_model(family)
    encoded = PAIR.encode(model)
    sites = [Site("q", 1), Site("k", 1)]
    found = softmaxes(model, encoded.clean, encoded.contrast, sites)
    other = model.run(encoded.contrast, record=sites)
    moved = 0.0
    for site in sites:
        layer = found[site]
        for pos in (2, 4):
            edit = Edit(site, patch(other), Where(pos))
            seen = model.run(encoded.clean, edits=edit, record="pattern.1")["pattern", 1].double()
            new = layer.logits.clone()
            if site.name == "q":
                new[:, :, pos] = layer.queries[:, :, pos]
            else:
                new[..., pos] = layer.keys[..., pos]
            if layer.sink is not None:
                new = torch.cat([new, layer.sink[..., None]], -1)
            mine = new.softmax(-1)[..., : seen.shape[-1]]
            assert (mine - seen).abs().max() < 2e-6
            plain = layer.logits.softmax(-1)
            moved = max(moved, float((plain - seen).abs().max()))
    assert moved > 1e-3
    if family == "gpt_oss":
        assert found[sites[0]].sink is not None


@pytest.mark.parametrize("sharp", [1.0, 40.0])
def test_the_qk_fix_is_exact_where_the_rest_is_linear(sharp: float) -> None:
    """With everything behind the softmax linear, only the softmax bends; saturation hides it."""
    model = linear(sure={2: sharp})
    for site in ("q", "k"):
        exact = activation_patching(model, PAIR, sites=site, control=False)["effect"].values[2]
        star = attribution_patching(model, PAIR, sites=site, method="atp*", **options())
        plain = attribution_patching(model, PAIR, sites=site, **options())["effect"].values[2]
        assert np.abs(exact).max() > 1e-3
        assert np.abs(star["signed"].values[2] - exact).max() < 2e-3 * np.abs(exact).max()
        assert np.abs(star["effect"].values[2] - np.abs(exact)).max() < 2e-3 * np.abs(exact).max()
        miss = np.abs(plain - exact).max()
        assert miss > 20 * np.abs(star["signed"].values[2] - exact).max()
        if sharp > 1:
            assert miss > 0.3 * np.abs(exact).max()


def test_keys_of_grouped_heads() -> None:
    """A key head serves several query heads, and all positions of it can move at once."""
    net: Any = random_model("llama").module
    net.model.norm = _Same()
    for block in net.model.layers:
        block.mlp.down_proj.weight.data.zero_()
    last = len(net.model.layers) - 1
    net.model.layers[last].self_attn.q_proj.weight.data *= 4
    model = Model(net, random_model("llama").tokenizer)
    assert net.config.num_key_value_heads < net.config.num_attention_heads
    for positions in ("each", "all", "last"):
        chosen: dict[str, Any] = {"sites": "k", "positions": positions}
        exact = activation_patching(model, PAIR, control=False, **chosen)["effect"].values[last]
        found = attribution_patching(model, PAIR, method="atp*", **chosen, **options())
        assert exact.shape[0] == net.config.num_key_value_heads
        assert np.abs(exact).max() > 1e-3
        assert (
            np.abs(found["signed"].values[last] - exact).max() < 1e-3 * np.abs(exact).max() + 1e-6
        )


def test_grad_drop_sees_what_cancels() -> None:
    """A part whose way through the next layer undoes its direct way: AtP finds nothing."""
    model = linear()
    net: Any = model.module
    half = net.config.n_embd // 2
    with torch.no_grad():
        for block in net.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
            block.mlp.c_fc.bias.zero_()
        first, second = (net.transformer.h[layer].mlp for layer in (0, 1))
        # Layer 0 writes into one half of the stream; layer 1 writes minus what it finds there.
        first.c_proj.weight[:, :half].normal_(generator=torch.Generator().manual_seed(0))
        second.c_fc.weight.zero_()
        second.c_fc.weight[:half, :half] = torch.eye(half)
        second.c_proj.weight[:half, :half] = -torch.eye(half)
    pair = Pairs.one("w20 w31 w12", "w20 w31 w18", "w30", "w33")
    chosen: dict[str, Any] = {"sites": "mlp_out", "positions": "last"}
    plain = attribution_patching(model, pair, **chosen, **options())["raw"].values
    star = attribution_patching(model, pair, method="atp*", **chosen, **options())
    assert abs(plain[0]) < 1e-6 and abs(plain[1]) > 0.01
    # Three layers, of which two are dropped without layer 0 itself; one of them lets it through.
    head = net.lm_head.weight[33] - net.lm_head.weight[30]
    clean, contrast = (
        model.run(prompt, record="mlp_out.0")["mlp_out", 0][0, -1]
        for prompt in (pair.clean[0], pair.contrast[0])
    )
    direct = abs(float((contrast - clean) @ head.detach()))
    assert direct > 0.01 and abs(float(star["raw"][0]) - direct / 2) < 1e-5


# What must not matter ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_the_batch_size_does_not_matter(town: Model, method: Any) -> None:
    pairs = town_pairs(4)
    assert len(set(pairs.encode(town).clean.lengths)) > 1
    chosen: dict[str, Any] = {"sites": "z", "method": method, "positions": "last", "steps": 2}
    whole = attribution_patching(town, pairs, **chosen, **options())
    assert np.abs(whole["effect"]).max() > 0.05
    for size in (1, 3):
        part = attribution_patching(town, pairs, batch_size=size, **chosen, **options())
        for name in ("effect", "raw", "sem", "change"):
            assert np.allclose(part[name], whole[name], atol=1e-5, equal_nan=True), name


def test_what_is_equal_has_no_effect(town: Model) -> None:
    pair = Pairs.one("The capital of France is", "The capital of France was", "Paris", "Rome")
    for method in ("atp", "atp*", "ig"):
        found = attribution_patching(town, pair, method=method, steps=2, **options())  # type: ignore[arg-type]
        assert not found["effect"].values[..., :-1].any()
        assert found["skipped"].values[..., :-1].all()
    again = attribution_patching(town, pair, **options())
    first = town.module.get_parameter(next(n for n, _ in town.module.named_parameters()))
    assert first.grad is None and np.abs(again["effect"].values[..., -1]).max() > 0


# Verification ------------------------------------------------------------------------------------


def test_estimates_are_checked_by_exact_patching(town: Model, tmp_path: Any) -> None:
    pairs = town_pairs(2)
    exact = activation_patching(town, pairs, sites="z", positions="last", control=False)
    found = attribution_patching(town, pairs, positions="last", verify=4, tail=12, subsets=8)
    seen = found["verified"].values > 0
    cells = int((~found["skipped"]).sum())
    assert (found["verified"] == 1).sum() == 4 and (found["verified"] == 2).sum() == cells - 4
    assert np.abs(found["exact"].values - exact["effect"].values)[seen].max() < 1e-4
    r = np.corrcoef(found["effect"].values.ravel(), exact["effect"].values.ravel())[0, 1]
    assert abs(float(found["pearson_all"]) - r) < 1e-3 and r > 0.5
    assert np.isnan(float(found["missed_bound"]))  # every cell was run
    text = found.view.to_json()
    assert f"Checked by exact patching of the 4 strongest of {cells} cells" in text
    assert View.from_json(text) == found.view
    loaded = type(found).load(found.save(tmp_path / "atp.json"))
    assert loaded.data.equals(found.data)
    bare = attribution_patching(town, pairs, positions="last", verify=0)
    assert "exact" not in bare.data and bare.view.kind == "grid"
    some = attribution_patching(town, pairs, positions="last", verify=2, tail=2, subsets=12,
                                theta=5.0)  # fmt: skip
    rest = exact["effect"].values[some["verified"].values == 0]
    assert float(some["missed_bound"]) >= np.abs(rest).max()
    assert 0 <= float(some["missed_p"]) <= 1 and "reaches 5 of the way has a p-value" in (
        some.view.to_json()
    )


def test_verify_knows_nothing_of_models() -> None:
    make = torch.Generator().manual_seed(0)
    truth = torch.randn(400, generator=make).double() ** 3

    def exact(sets: Any) -> Tensor:
        return torch.stack([truth[list(cells)].sum() for cells in sets])

    noisy = truth + 0.5 * torch.randn(400, generator=make)
    found = verify(noisy, exact, k=20, tail=200, seed=1)
    r = float(torch.corrcoef(torch.stack([noisy, truth]))[0, 1])
    assert abs(found.all.pearson - r) < 0.03
    best = set(truth.abs().topk(20).indices.tolist())
    recall = len(best & set(noisy.abs().topk(20).indices.tolist())) / 20
    whole = verify(noisy, exact, k=20, tail=400)
    assert whole.recall == recall and abs(whole.all.pearson - r) < 1e-9
    assert whole.chance < 0.15 < whole.all.pearson
    useless = verify(torch.randn(400, generator=make).double(), exact, k=20, tail=100)
    assert abs(useless.all.pearson) < 0.3 and useless.recall < 0.5
    flat = verify(truth, lambda sets: torch.zeros(len(sets)), k=5, tail=5)
    assert np.isnan(flat.all.pearson) and "undefined" in flat.statements()[0]
    unsigned = verify(truth.abs(), exact, k=20, tail=380, unsigned=True)
    assert abs(unsigned.all.pearson - 1) < 1e-9
    with pytest.raises(NotFinite):
        verify(truth.index_fill(0, torch.tensor([3]), torch.nan), exact)
    with pytest.raises(UsageError, match="no cell"):
        verify(truth, exact, ignore=torch.ones(400, dtype=torch.bool))
    with pytest.raises(OutOfRange):
        verify(truth, exact, k=0)


def test_the_bound_covers_what_was_missed() -> None:
    """The bound holds in nearly all draws, and is not made of air: it follows the effects."""
    held = 0
    for seed in range(20):
        make = torch.Generator().manual_seed(seed)
        small = 0.01 * torch.randn(60, generator=make).double()
        small[7] = 0.3 if seed % 2 else 0.0

        def exact(sets: Any, small: Tensor = small) -> Tensor:
            return torch.stack([small[list(cells)].sum() for cells in sets])

        found = missed_effect_bound(exact, range(60), subsets=48, seed=seed, theta=0.3)
        held += found.bound >= float(small.abs().max())
        assert found.bound < (1.0 if seed % 2 else 0.3)
        assert (found.p_value < 0.05) == (seed % 2 == 0)
    assert held == 20
    two = torch.tensor([0.5, 0.1]).double()  # most subsets of two cells are empty

    def few(sets: Any) -> Tensor:
        return torch.stack([torch.stack([two[cell] for cell in cells]).sum() for cells in sets])

    assert abs(missed_effect_bound(few, range(2), subsets=16).bound - 0.5) < 0.4
    with pytest.raises(OutOfRange):
        missed_effect_bound(lambda sets: torch.zeros(len(sets)), range(60), subsets=4)


# Town --------------------------------------------------------------------------------------------


def test_town_agrees_with_exact_patching(town: Model) -> None:
    pairs = town_pairs(3)
    exact = activation_patching(town, pairs, sites="k", direction="noise", positions="all",
                                control=False)["effect"].values.ravel()  # fmt: skip

    def r(method: Any, name: str = "effect") -> float:
        found = attribution_patching(
            town, pairs, sites="k", direction="noise", positions="all", method=method, **options()
        )
        return float(np.corrcoef(found[name].values.ravel(), exact)[0, 1])

    assert r("ig") > 0.9
    assert r("atp*", "signed") > 0.9 > r("atp")


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_baselines_are_checked_by_exact_patching(town: Model, value: Any) -> None:
    pairs = town_pairs(3)
    found = attribution_patching(
        town, pairs, direction="noise", value=value, positions="all", verify=64, tail=0
    )
    exact = activation_patching(
        town, pairs, sites="z", direction="noise", value=value, positions="all", control=False
    )
    assert (found["verified"].values > 0).all()  # every head
    assert np.allclose(found["exact"].values, exact["effect"].values, atol=1e-5)
    assert float(found["pearson_all"]) > 0.5 > float(found["pearson_chance"]) * 0.9


def test_refusals(town: Model) -> None:
    pair = town_pairs(1)
    with pytest.raises(UsageError, match="direction='noise'"):
        attribution_patching(town, pair, value="zero")
    with pytest.raises(UsageError, match="clean run"):
        attribution_patching(town, pair, value="mean", direction="noise", grad_at="both")
    with pytest.raises(UsageError, match="QK fix"):
        attribution_patching(town, pair, sites="k", value="zero", direction="noise", method="atp*")
    with pytest.raises(UsageError, match="no gradient"):
        attribution_patching(town, pair, metric="rank")
    with pytest.raises(OutOfRange):
        attribution_patching(town, pair, steps=0)
    with pytest.raises(UsageError, match="no vector per position"):
        attribution_patching(town, pair, sites="pattern")
    with pytest.raises(NotOffered, match="as a whole"):
        attribution_patching(town, pair, sites="mlp_post", units=(1, 2), method="ig")
    alike = Pairs.one(
        "When Kate and Paul went to the office, Kate lent a gift to",
        "When Kate and Paul went to the school, Kate lent a gift to",
    ).with_answers("Paul")
    with pytest.raises(PairError, match="says the same"):
        attribution_patching(town, Pairs(alike.clean[0], alike.contrast[0]))
    pairs = town_pairs(1)
    swapped = Pairs(
        [pairs.clean[0], pairs.contrast[0]], [pairs.contrast[0], pairs.clean[0]],
        [pairs.answers[0]] * 2, [pairs.wrong[0]] * 2,
    )  # fmt: skip
    with pytest.raises(PairError, match="does not tell"):  # over both rows the ends are the same
        attribution_patching(town, swapped)
    with pytest.raises(PairError, match="nothing to exchange|no cell holds"):
        attribution_patching(town, pair, positions=(0,))
