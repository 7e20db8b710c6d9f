"""Patterns, entropy and value weights against brute force and planted patterns."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model

import underhood as uh
from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.methods.read.attention import attention


def _views(result: Any) -> list[Any]:
    return result.view.views


TEXT = "w11 w12 w13 w11 w14 w15"


@pytest.fixture(scope="module")
def llama() -> uh.Model:
    return random_model("llama")


def test_uniform_and_single_key_patterns_have_the_known_entropies(llama: uh.Model) -> None:
    n = 6
    uniform = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    first = torch.zeros(n, n)
    first[:, 0] = 1
    plan = uh.Plan(
        [uh.Edit("pattern.1.2", uh.set_to(uniform)), uh.Edit("pattern.0.3", uh.set_to(first))]
    )
    result = attention(llama, TEXT, edits=plan)
    expected = np.log(np.arange(1, n + 1))
    np.testing.assert_allclose(result["entropy"].sel(layer=1, head=2), expected, atol=1e-6)
    np.testing.assert_allclose(result["uniform_entropy"].sel(layer=1), expected, atol=1e-6)
    assert float(result["mean_entropy"].sel(layer=0, head=3)) == pytest.approx(0.0, abs=1e-9)
    assert result["top_key"].sel(layer=0, head=3).values.tolist() == [0.0] * n
    # Random heads lie strictly between the two.
    other = result["mean_entropy"].sel(layer=2).values
    assert (other > 0).all() and (other < expected[1:].mean()).all()
    thumbs = next(v for v in _views(result) if v.kind == "heads")
    assert thumbs.heads[0].label == "a0.h3"


def test_statistics_agree_with_the_recorded_pattern(llama: uh.Model) -> None:
    result = attention(llama, TEXT, layers=(1,))
    pattern = llama.run(TEXT, record="pattern.1")["pattern.1"][0]
    assert result["pattern"].shape == (1, 4, 6, 6)
    for head in range(4):
        for query in range(6):
            row = pattern[head, query, : query + 1].double()
            here = {"layer": 1, "head": head, "query": query}
            entropy = -float((row * row.log()).sum())
            assert float(result["entropy"].sel(here)) == pytest.approx(entropy, abs=1e-5)
            assert int(result["top_key"].sel(here)) == int(row.argmax())
    assert result["key_token"].values.tolist() == TEXT.split()


def test_value_weights_use_each_query_heads_own_output(llama: uh.Model) -> None:
    """Grouped heads: what one key writes alone is `head_out` under a pattern that sees only it."""
    result = attention(llama, TEXT, value_weighted=True)
    for key in (0, 3):
        only = torch.zeros(6, 6)
        only[:, key] = 1
        run = llama.run(TEXT, record="head_out.1", edits=uh.Edit("pattern.1", uh.set_to(only)))
        # The last position, so that a causal model may see the key.
        written = run["head_out.1"][0, -1].norm(dim=-1)
        seen = result["value_norm"].sel(layer=1, key=key).values
        np.testing.assert_allclose(seen, written.numpy(), rtol=1e-4)
    weighted = result["weighted"].values
    np.testing.assert_allclose(weighted.sum(-1), 1, atol=1e-6)
    raw = result["pattern"].values * result["value_norm"].values[:, :, None]
    np.testing.assert_allclose(weighted, raw / raw.sum(-1, keepdims=True), atol=1e-9)


def test_layers_without_attention_are_skipped_or_refused() -> None:
    hybrid = random_model("jamba")
    assert attention(hybrid, TEXT)["layer"].values.tolist() == [1]
    with pytest.raises(NotOffered, match="no attention"):
        attention(hybrid, TEXT, layers=(0,))
    with pytest.raises(NotOffered):
        attention(random_model("mamba"), TEXT)
    with pytest.raises(NotOffered, match="encoder"):
        attention(random_model("t5"), TEXT)


def test_sliding_windows_and_leftover_weight_keep_entropy_below_uniform() -> None:
    for family in ("mistral", "gpt_oss", "bert"):
        result = attention(random_model(family), TEXT)
        entropy, chance = result["entropy"].values, result["uniform_entropy"].values
        assert np.isfinite(entropy).all(), family
        assert (entropy <= chance[:, None] + 1e-6).all(), family
        if family == "bert":
            np.testing.assert_allclose(chance, math.log(6))


def test_heads_are_drawn_as_named_and_refused_before_the_forward(llama: uh.Model) -> None:
    result = attention(llama, TEXT, heads=("2.1", "0.0"))
    thumbs = next(v for v in _views(result) if v.kind == "heads")
    assert [h.label for h in thumbs.heads] == ["a2.h1", "a0.h0"]
    grid = next(v for v in _views(result) if v.kind == "grid")
    assert grid.control is not None and grid.control.limit == grid.limit
    for wrong, error in ((("1.9",), OutOfRange), (("one",), UsageError), (("7.0",), UsageError)):
        with pytest.raises(error):
            attention(llama, TEXT, heads=wrong)
    with pytest.raises(OutOfRange):
        attention(llama, TEXT, layers=(9,))
    with pytest.raises(UsageError):
        attention(llama, TEXT, show=0)


def test_one_token_has_no_mean_entropy(llama: uh.Model) -> None:
    result = attention(llama, "w11")
    assert np.isnan(result["mean_entropy"].values).all()
    assert result.view.html()
