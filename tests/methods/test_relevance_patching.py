"""Relevance patching: against formulas written by hand, exact patching, and plain gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor, nn
from torch.nn import functional as F

import underhood as uh
from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.taps.patches import active_patches
from underhood.data import Pairs
from underhood.methods.locate.activation_patching import activation_patching
from underhood.methods.locate.attribution_patching import attribution_patching
from underhood.methods.locate.relevance_patching import RULE_SETS, relevance_patching
from underhood.organisms import organism
from underhood.view import View

PAIR = Pairs.one("w20 w31 w12 w40 w55 w9", "w20 w31 w18 w40 w56 w9", "w30", "w33")


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def town_pairs(task: str, n: int, seed: int = 0) -> Pairs:
    return organism("village").pairs(task, n, seed)


# The rules as formulas, written into the library's classes ---------------------------------------


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    root = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
    return x / root.detach() * self.weight + self.bias


def _rms(self: Any, x: Tensor) -> Tensor:
    root = (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
    return self.weight * (x / root.detach())


def _times(phi: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * (phi(x) / (x + torch.where(x < 0, -1e-6, 1e-6))).detach()

    return forward


def _halved(self: Any, x: Tensor) -> Tensor:
    y = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(y / 2 + (y / 2).detach())


def _by_hand(patch: pytest.MonkeyPatch, rules: tuple[str, ...]) -> None:
    from transformers.activations import NewGELUActivation, SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    gelu = _times(lambda x: F.gelu(x, approximate="tanh"))
    rows: tuple[tuple[str, type, Any], ...] = (
        ("ln", nn.LayerNorm, _layer_norm), ("ln", LlamaRMSNorm, _rms),
        ("identity", NewGELUActivation, gelu), ("identity", SiLUActivation, _times(F.silu)),
        ("half", LlamaMLP, _halved),
    )  # fmt: skip
    for rule, cls, forward in rows:
        if rule in rules:
            patch.setattr(cls, "forward", forward)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rules", list(RULE_SETS))
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_is_attribution_patching_by_the_rules(family: str, rules: Any, direction: Any) -> None:
    model = random_model(family)
    for sites in (("resid_pre", "mlp_out"), "z"):
        options: dict[str, Any] = {"sites": sites, "direction": direction, "verify": 0}
        found = relevance_patching(model, PAIR, rules=rules, **options)
        plain = attribution_patching(model, PAIR, **options)
        with pytest.MonkeyPatch.context() as patch:
            _by_hand(patch, RULE_SETS[rules])
            expected = attribution_patching(model, PAIR, **options)
        assert set(found.data.variables) == set(plain.data.variables)
        assert found["effect"].dims == plain["effect"].dims
        for name in ("effect", "raw", "change"):
            size = np.abs(expected[name].values).max()
            assert np.abs(found[name].values - expected[name].values).max() < 1e-4 * size, name
            assert np.abs(found[name].values - plain[name].values).max() > 1e-3, name
        assert (found["clean"] == plain["clean"]).all()  # the forward is the same, bit for bit
        assert (found["contrast"] == plain["contrast"]).all()


def test_behind_the_last_mlp_it_freezes_the_final_norm(town: Model) -> None:
    """Only the final norm follows: the score is the direct effect with the contrast's scale."""
    pairs = town_pairs("capitals", 1)
    encoded = pairs.encode(town)
    found = relevance_patching(town, pairs, positions="last", verify=0)
    last = town.n_layers - 1
    runs = [town.run(t, record=["mlp_out", "resid_post"], at=-1)
            for t in (encoded.clean, encoded.contrast)]  # fmt: skip
    delta = (runs[0]["mlp_out", last] - runs[1]["mlp_out", last])[0, 0]
    head = Head(town)
    form = head.form()
    assert form is not None
    scale = form.scale(runs[1]["resid_post", last][0, 0])
    right, wrong = int(encoded.answers[0, 0]), int(encoded.wrong[0, 0])
    direction = head.directions([right, wrong])
    expected = float((form.linear(delta, scale) @ (direction[0] - direction[1])).detach())
    assert abs(expected) > 0.1
    assert float(found["raw"][last]) == pytest.approx(expected, rel=1e-4)


# Closer than gradients ---------------------------------------------------------------------------


def _per_row(found: Any, exact: Any) -> tuple[np.ndarray, np.ndarray]:
    """Estimated and exact changes of all cells that are not known to be zero, row by row."""
    truth = exact["patched"].values - exact["contrast"].values
    live = np.isfinite(truth) & ~exact["skipped"].values[..., None]
    return found["change"].values[live], truth[live]


def test_it_is_closer_to_exact_patching_than_gradients_are(town: Model) -> None:
    """All tasks of the town, cell by cell and row by row; measured with 24 pairs a task:

    MLP outputs 0.976 against 0.970, attention outputs 0.973 against 0.910, stream 0.973 against
    0.905 (rules of the paper). Greater-than is the exception on MLP outputs (0.77 against 0.97):
    there the norms' scale matters.
    """
    counts = (("mlp_out", 3, 0.98), ("resid_pre", 2, 0.95))
    for site, number, most in counts:
        rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"paper": [], "quick_start": []}
        rows["atp"] = []
        options: dict[str, Any] = {"sites": site, "verify": 0}
        for task in organism("village").tasks:
            pairs = town_pairs(task, number)
            exact = activation_patching(town, pairs, sites=site, control=False)
            rows["atp"].append(_per_row(attribution_patching(town, pairs, **options), exact))
            for rules in ("paper", "quick_start"):
                found = relevance_patching(town, pairs, rules=rules, **options)
                rows[rules].append(_per_row(found, exact))
        pooled = {
            name: _pearson(*(np.concatenate(x) for x in zip(*parts, strict=True)))
            for name, parts in rows.items()
        }
        wins = [
            _pearson(*a) > _pearson(*b) for a, b in zip(rows["paper"], rows["atp"], strict=True)
        ]
        assert pooled["atp"] < most
        assert min(pooled["paper"], pooled["quick_start"]) > max(pooled["atp"], 0.95), (
            site,
            pooled,
        )
        # Task by task, three pairs say less.
        assert sum(wins) >= 3, (site, wins)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


# The check ---------------------------------------------------------------------------------------


def test_the_check_compares_both_estimates_with_exact_patching(town: Model) -> None:
    pairs = town_pairs("indirect_object", 3)
    options: dict[str, Any] = {"sites": ("attn_out", "mlp_out"), "positions": "last"}
    found = relevance_patching(town, pairs, **options)  # 8 cells: all of them are run
    exact = activation_patching(town, pairs, control=False, **options)
    plain = attribution_patching(town, pairs, verify=0, **options)
    assert np.abs(found["exact"].values - exact["effect"].values).max() < 1e-5
    assert np.abs(found["atp"].values - plain["effect"].values).max() < 1e-6
    truth = exact["effect"].values.ravel()
    for name, estimate in (("pearson_all", "effect"), ("pearson_atp", "atp")):
        expected = np.corrcoef(found[estimate].values.ravel(), truth)[0, 1]
        assert float(found[name]) == pytest.approx(expected, abs=1e-6)
    assert found["pearson_all"] != found["pearson_atp"]
    assert (found["verified"].values == 1).all() and found["recall"] == 1.0


def test_the_check_runs_what_either_estimate_names(town: Model) -> None:
    pairs = town_pairs("indirect_object", 2)
    found = relevance_patching(town, pairs, verify=6, tail=9, rules="ln", seed=3)
    flat = {name: found[name].values.ravel() for name in ("effect", "atp", "exact", "verified")}
    live = ~found["skipped"].values.ravel()
    drawn = flat["verified"]
    top, named = (
        set(np.argsort(-np.where(live, np.abs(flat[name]), -1), kind="stable")[:6])
        for name in ("effect", "atp")
    )
    assert top != named  # else the test shows nothing
    assert set(np.nonzero(drawn == 1)[0]) == top and set(np.nonzero(drawn == 3)[0]) == named - top
    assert 5 <= (drawn == 2).sum() <= 9
    assert (np.isfinite(flat["exact"]) == (drawn > 0)).all() and not drawn[~live].any()
    exact = activation_patching(town, pairs, sites="mlp_out", control=False)["effect"].values
    assert np.nanmax(np.abs(exact.ravel() - flat["exact"])) < 1e-5
    # The weighted numbers stand for the whole grid.
    whole = np.corrcoef(flat["effect"][live], exact.ravel()[live])[0, 1]
    assert float(found["pearson_all"]) == pytest.approx(whole, abs=0.05)
    assert float(found["pearson_atp"]) == pytest.approx(
        np.corrcoef(flat["atp"][live], exact.ravel()[live])[0, 1], abs=0.05
    )
    again = relevance_patching(town, pairs, verify=6, tail=9, rules="ln", seed=3)
    assert again.data.equals(found.data)
    off = relevance_patching(town, pairs, verify=0)
    assert "exact" not in off.data and "pearson_all" not in off.data and off.view.kind == "grid"


# What must hold ----------------------------------------------------------------------------------


def test_the_batch_size_does_not_matter(town: Model) -> None:
    pairs = town_pairs("indirect_object", 5)
    whole = relevance_patching(town, pairs, verify=0)
    assert len(set(pairs.encode(town).clean.lengths)) > 1
    for size in (1, 2):
        part = relevance_patching(town, pairs, verify=0, batch_size=size)
        for name in ("effect", "sem", "raw", "change"):
            assert np.allclose(part[name], whole[name], atol=2e-5, equal_nan=True), name


def test_positions_and_points(town: Model) -> None:
    pairs = town_pairs("indirect_object", 2)
    each = relevance_patching(town, pairs, verify=0)
    joint = relevance_patching(town, pairs, verify=0, positions="all")
    assert np.allclose(each["change"].sum("pos", skipna=True), joint["change"], atol=1e-6)
    points = {
        point: relevance_patching(town, pairs, verify=0, grad_at=point)["change"].values
        for point in ("base", "clean", "corrupt", "both")
    }
    assert np.allclose(points["base"], points["corrupt"], equal_nan=True)
    mean = (points["clean"] + points["corrupt"]) / 2
    assert np.allclose(points["both"], mean, atol=1e-6, equal_nan=True)
    assert not np.allclose(points["clean"], points["corrupt"], atol=0.01, equal_nan=True)


def test_fixed_patterns_send_nothing_to_queries(town: Model) -> None:
    pairs = town_pairs("indirect_object", 1)
    plain = relevance_patching(town, pairs, sites="attn_out", verify=0)
    fixed = relevance_patching(town, pairs, sites="attn_out", verify=0, fixed_patterns=True)
    assert fixed.provenance["rules"] == ["ln", "identity", "half", "heads"]
    assert not np.allclose(plain["effect"], fixed["effect"], atol=1e-3)
    with pytest.raises(NotOffered, match="no gradient comes back"):
        relevance_patching(town, pairs, sites="q", verify=0, fixed_patterns=True)
    with pytest.raises(NotOffered, match="no gradient comes back"):
        relevance_patching(town, pairs, sites="k", verify=0, fixed_patterns=True)
    assert active_patches() == 0


@pytest.mark.parametrize(
    "family", ["gemma2", "qwen3", "gpt_neox", "olmo2", "phi3", "mixtral", "gpt_oss"]
)
def test_families(family: str) -> None:
    model = random_model(family)
    options: dict[str, Any] = {"sites": ("attn_out", "mlp_out"), "verify": 0}
    found = relevance_patching(model, PAIR, **options)
    plain = attribution_patching(model, PAIR, **options)
    assert np.isfinite(found["effect"]).all()
    assert np.abs(found["effect"] - plain["effect"]).max() > 1e-3
    assert (found["clean"] == plain["clean"]).all()
    again = attribution_patching(model, PAIR, **options)
    assert again.data.equals(plain.data)  # nothing was left behind
    touched = found.provenance["touched"]
    gates = 0 if family == "gpt_neox" else 3
    assert [len(touched[rule]) for rule in ("identity", "half")] == [3, gates]


def test_result_and_view(town: Model, tmp_path: Any) -> None:
    found = relevance_patching(
        town, town_pairs("indirect_object", 2), sites=("attn_out", "mlp_out")
    )
    assert found.view.kind == "group" and "ln + identity + half" in str(found.view.title)
    text = found.view.to_json()
    assert "AtP" in text and f"{float(found['pearson_atp']):.3f}" in text
    assert f"{float(found['pearson_all']):.3f}" in text
    assert View.from_json(text) == found.view
    assert type(found).load(found.save(tmp_path / "relp.json")).data.equals(found.data)
    touched = found.provenance["touched"]
    layers = town.n_layers
    counts = [len(touched[rule]) for rule in ("ln", "identity", "half")]
    assert counts == [2 * layers + 1, layers, layers]


def test_refusals(town: Model) -> None:
    pairs = town_pairs("capitals", 1)
    with pytest.raises(UsageError, match="no gradient"):
        relevance_patching(town, pairs, metric="rank")
    with pytest.raises(OutOfRange):
        relevance_patching(town, pairs, batch_size=0)
    with pytest.raises(UsageError, match="over layers"):
        relevance_patching(town, pairs, sites="z.1.2")
    with pytest.raises(NotOffered, match='"identity"'):
        relevance_patching(random_model("mamba"), PAIR, sites="attn_out")
    relevance_patching(random_model("mamba"), PAIR, sites="attn_out", rules="ln", verify=0)
    assert active_patches() == 0
