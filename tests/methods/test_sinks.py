"""Sinks: planted patterns, values and streams give the known scores."""

import numpy as np
import pytest
import torch
from random_models import random_model

import underhood as uh
from underhood.core.errors import NotOffered, UsageError
from underhood.methods.read.sinks import decorrelation_loss, sinks

TEXTS = [
    "When Mary and John went to the store , John gave a drink to",
    "The capital of France is Paris .",
]
WORDS = "w11 w12 w13 w14 w15 w16 w17 w18"


@pytest.fixture(scope="module")
def town() -> uh.Model:
    return uh.load()


def _looking_at(size: int, place: int) -> torch.Tensor:
    pattern = torch.eye(size)
    pattern[place + 1 :] = 0
    pattern[place + 1 :, place] = 1
    return pattern


def test_a_planted_sink_is_found_with_its_head_layer_and_token() -> None:
    model = random_model("llama")
    first, third = _looking_at(8, 0), _looking_at(8, 2)
    plan = uh.Plan([
        uh.Edit("pattern.0", uh.set_to(torch.eye(8))),
        uh.Edit("pattern.1.2", uh.set_to(first)),
        uh.Edit("pattern.2", uh.set_to(third)),
    ])  # fmt: skip
    result = sinks(model, [WORDS], edits=plan)
    assert float(result["sink"].sel(layer=1, head=2)) == pytest.approx(1.0)
    assert str(result["label"].sel(layer=1, head=2).values) == "dormant"
    assert (result["label"].sel(layer=0).values == "active").all()
    np.testing.assert_allclose(result["sink"].sel(layer=0), 0, atol=1e-7)
    # Layer 2: everybody looks at the third token from the fourth on; 5 of the 7 later queries.
    np.testing.assert_allclose(result["sink_detected"].sel(layer=2), 6 / 7 - 0, atol=1e-6)
    at = result["pos"].values.tolist().index(2)
    assert result["token"].values[at] == "w13" and "2" in str(result["layers"].values[at])
    assert float(result["received"].values[at]) == pytest.approx(1.0)


def test_drain_and_peak_follow_a_planted_value_and_stream() -> None:
    model = random_model("llama")  # two value heads for four query heads
    values = model.run(WORDS, record="v.1")["v.1"][0]
    sizes = values.norm(dim=-1)
    plan = uh.Plan([
        uh.Edit("v.1.0", uh.scale(0.01), 0), uh.Edit("mlp_out.1", uh.scale(1000.0), 0),
    ])  # fmt: skip
    result = sinks(model, [WORDS], edits=plan)
    sizes[0, 0] *= 0.01
    expected = (sizes[0] / sizes.median(0).values).repeat_interleave(2)
    np.testing.assert_allclose(result["drain"].sel(layer=1), expected, rtol=1e-4)
    stream = model.run(WORDS, record="resid_post", edits=plan)["resid_post"][:, 0].norm(dim=-1)
    np.testing.assert_allclose(result["peak"], stream[:, 0] / stream.median(-1).values, rtol=1e-4)
    assert float(result["peak"][1]) > 20 * float(result["peak"][0])
    assert float(result["peak_control"][1]) < 3


def test_scores_agree_with_brute_force_and_ignore_padding(town: uh.Model) -> None:
    result = sinks(town, TEXTS)
    total = torch.zeros(town.n_layers, town.n_heads, dtype=torch.float64)
    for text in TEXTS:
        run = town.run(text, record="pattern")
        for layer in range(town.n_layers):
            total[layer] += run["pattern", layer][0, :, 1:, 0].double().mean(-1)
    np.testing.assert_allclose(result["sink"], total / 2, atol=1e-5)
    one, two = (sinks(town, [text]) for text in TEXTS)
    for name in ("sink", "sink_control", "drain", "peak", "sink_no_bos"):
        mean = (one[name].values + two[name].values) / 2
        np.testing.assert_allclose(result[name].values, mean, rtol=1e-4, atol=1e-5)
    assert result.data.sizes["node"] == one.data.sizes["node"] + two.data.sizes["node"]


def test_the_control_of_uniform_attention_is_the_expected_share(town: uh.Model) -> None:
    n = 8
    flat = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    model = random_model("gpt2")
    result = sinks(model, [WORDS], edits=uh.Plan([uh.Edit("pattern", uh.set_to(flat))]))
    weights = 1 / np.arange(1, n + 1)
    expected = np.mean([weights[s + 1 :].mean() for s in range(1, n - 1)])
    np.testing.assert_allclose(result["sink_control"], expected, atol=1e-6)
    np.testing.assert_allclose(result["sink"], weights[1:].mean(), atol=1e-6)


def test_without_a_bos_token_the_note_says_so_and_nothing_is_compared() -> None:
    result = sinks(random_model("llama"), [WORDS])
    assert "sink_no_bos" not in result.data
    assert "no BOS" in result.provenance["note"]


def test_hybrids_keep_their_layers_and_unoffered_values_are_named() -> None:
    result = sinks(random_model("jamba"), [WORDS])
    assert np.isnan(result["sink"].sel(layer=0)).all()
    assert np.isfinite(result["sink"].sel(layer=1)).all()
    assert np.isfinite(result["peak"]).all()
    assert "drain" not in sinks(random_model("bloom"), [WORDS]).data
    with pytest.raises(NotOffered):
        sinks(random_model("mamba"), [WORDS])


def test_bad_requests_are_refused(town: uh.Model) -> None:
    for call in (
        lambda: sinks(town, ["The capital"]),
        lambda: sinks(town, []),
        lambda: sinks(town, TEXTS, threshold=1.5),
    ):
        with pytest.raises(UsageError):
            call()


def test_decorrelation_loss_of_orthogonal_and_copied_states() -> None:
    eye = torch.eye(4).expand(3, 2, 4, 4)
    assert float(decorrelation_loss(eye)) == 0.0
    assert float(decorrelation_loss(torch.ones(3, 2, 4, 5))) == pytest.approx(1.0)
    states = torch.eye(4).repeat(1, 1, 1, 1)
    states[0, 0, 3] = states[0, 0, 0]  # padding that copies the first token must not count
    mask = torch.tensor([[True, True, True, False]])
    assert float(decorrelation_loss(states, mask)) == 0.0
    assert float(decorrelation_loss(states)) == pytest.approx(1 / 3)


def test_decorrelation_loss_can_be_trained_down() -> None:
    states = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) + 1
    states.requires_grad_()
    before = decorrelation_loss(states)
    before.backward()
    assert states.grad is not None and bool(states.grad[:, :, 0].abs().sum() > 0)
    after = decorrelation_loss((states - 5 * states.grad).detach())
    assert float(after) < before.item()
