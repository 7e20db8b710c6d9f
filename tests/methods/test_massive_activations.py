"""Massive activations: planted giants are found exactly, and nothing else is."""

from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor, nn

import underhood as uh
from underhood.core.errors import UsageError
from underhood.methods.read.massive_activations import gaussian_ratio, massive_activations
from underhood.view import Result

TEXTS = ["w11 w12 w13 w14 w15 w16", "w21 w22 w23"]


class _Giant(nn.Module):
    """A down projection that adds 3,000 to one dimension at the first position."""

    def __init__(self, inner: nn.Module, dim: int) -> None:
        super().__init__()
        self.inner, self.dim = inner, dim

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        boost = torch.zeros_like(out)
        boost[:, 0, self.dim] = 3000
        return out + boost


def test_a_giant_in_the_weights_is_found_exactly() -> None:
    model = random_model("llama")
    layer = model.module.get_submodule("model.layers.1.mlp")
    layer.down_proj = _Giant(layer.down_proj, 5)  # type: ignore[assignment]
    result = massive_activations(uh.load(model.module, model.tokenizer), TEXTS)
    found = zip(*(result[n].values.tolist() for n in ("layer_of", "pos", "dim")), strict=True)
    assert set(found) == {(1, 0, 5), (2, 0, 5)}
    assert set(result["token"].values) == {"w11", "w21"}
    assert result.data.attrs["first_layer"] == 1
    assert result.data.attrs["dims"] == [5]
    assert result.data.attrs["count"] == 4  # two texts, two layers
    assert bool(result["opening"].all())
    assert float(result["value"].values.max()) == pytest.approx(3000, rel=0.01)
    ratio, rest = result["ratio"].values, result["ratio_rest"].values
    assert ratio[1] > 1000 > 20 > rest[1]


def test_both_rules_apart() -> None:
    """A giant below 100 is massive by the free rule only."""
    model = random_model("llama")
    median = float(model.run(TEXTS[0], record="resid_post.1")["resid_post.1"].abs().median())
    vector = torch.zeros(32)
    vector[7] = 50 * median
    assert vector[7] < 90
    plan = uh.Plan([uh.Edit("mlp_out.1", uh.add(vector), 2)])
    result = massive_activations(model, [TEXTS[0]], ratio=40.0, edits=plan)
    here = result["layer_of"].values == 1
    assert result["dim"].values[here].tolist() == [7]
    assert result["pos"].values[here].tolist() == [2]
    assert result["token"].values[here].tolist() == ["w13"]
    assert not result["opening"].any() and not result["published"].any()
    assert result.data.attrs["count_published"] == 0
    assert massive_activations(model, [TEXTS[0]], edits=plan).data.attrs["count"] == 0


def test_statistics_agree_with_brute_force_and_ignore_padding() -> None:
    model = random_model("gpt2")
    result = massive_activations(model, TEXTS)
    tops, medians, ratios = [], [], []
    for text in TEXTS:
        size = model.run(text, record="resid_post")["resid_post"][:, 0].abs().flatten(1)
        ordered = size.sort(dim=-1, descending=True).values
        tops.append(ordered[:, :3])
        medians.append(ordered.median(-1).values)
        ratios.append(ordered[:, 0] / medians[-1])
    np.testing.assert_allclose(result["top"], torch.stack(tops).mean(0), rtol=1e-4)
    np.testing.assert_allclose(result["median"], torch.stack(medians).mean(0), rtol=1e-4)
    np.testing.assert_allclose(result["ratio"], torch.stack(ratios).mean(0), rtol=1e-4)


def test_none_is_said_in_a_sentence_and_the_result_survives_a_file(tmp_path: object) -> None:
    result = massive_activations(random_model("mamba"), TEXTS)
    assert result.data.sizes["node"] == 0 and result.data.attrs["first_layer"] == -1
    assert "No scalar reaches 1,000 times" in result.view.html()
    views: Any = getattr(result.view, "views", [])
    assert views and "table" not in [v.kind for v in views]
    again = Result.load(str(result.save(f"{tmp_path}/massive")))
    assert again.data.identical(result.data)


def test_the_normal_control_is_what_normal_values_give() -> None:
    make = torch.Generator().manual_seed(0)
    for n in (64, 3000):
        draws = torch.randn(3000, n, generator=make).abs()
        seen = float((draws.amax(-1) / draws.median(-1).values).mean())
        assert gaussian_ratio(n) == pytest.approx(seen, rel=0.03)


def test_town_and_its_bos() -> None:
    result = massive_activations(uh.load(), ["The capital of France is", "The keys near the lamp"])
    assert result.data.attrs["opening_is_bos"] == 1
    assert np.isfinite(result["ratio"]).all()
    assert (result["ratio"] > 1).all()
    assert (result["top"].diff("rank") <= 0).all()


def test_bad_requests_are_refused() -> None:
    model = random_model("llama")
    with pytest.raises(UsageError):
        massive_activations(model, TEXTS, ratio=1.0)
    with pytest.raises(UsageError):
        massive_activations(model, [])
