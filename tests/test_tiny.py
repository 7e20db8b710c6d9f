"""Every family of tiny models builds, runs, repeats itself and is not degenerate."""

from typing import Any

import pytest
import torch
from torch import Tensor

from underhood.core.errors import SiteNotFound, UsageError
from underhood.organisms.tiny import FAMILIES, TinyModel, tiny
from underhood.organisms.tiny_families import FAMILY_TABLE

pytestmark = pytest.mark.families

CAUSAL = [family for family in FAMILIES if FAMILY_TABLE[family][2] == "causal"]
# Not a key-value cache: nothing to hand to the next call (recurrent_gemma keeps it on the modules).
# The first GPT has no cache at all.
OWN_CACHE = {"recurrent_gemma", "openai"}
# One cached token of several rows mixes the rows in transformers: `(batch, 1, width)` meets a state
# of `(batch, width)`, which broadcasts to `(batch, batch, width)`.
ONE_ROW_CACHE = {"rwkv"}


@torch.no_grad()
def logits_of(model: TinyModel, **inputs: Tensor) -> Tensor:
    out: Any = model.module(**inputs)
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.logits_per_image


@pytest.mark.parametrize("family", FAMILIES)
def test_forward(family: str) -> None:
    model = tiny(family)
    assert model.family == family
    assert not model.module.training
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    inputs = model.inputs()
    logits = logits_of(model, **inputs)
    assert torch.isfinite(logits).all()
    assert logits.shape[0] == 2
    assert 0.05 < logits.std() < 6
    if model.kind != "image_text":  # whose scores pair every row with every other
        alone = model.inputs(batch=1)
        assert logits_of(model, **alone).shape[1:] == logits.shape[1:]
        assert not torch.allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds(family: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (tiny(family, seed=seed).module.state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    model = tiny(family)
    same, too, different = model.inputs(seed=1), model.inputs(seed=1), model.inputs(seed=2)
    assert all(torch.equal(same[name], too[name]) for name in same)
    assert any(not torch.equal(same[name], different[name]) for name in same)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_idle_weights(family: str) -> None:
    """Norms have gains of their own, and no trained tensor is constant or tiny."""
    for name, parameter in tiny(family).module.named_parameters():
        if parameter.requires_grad and parameter.numel() > 1:
            assert parameter.std() > 0.02, name


@pytest.mark.parametrize("family", CAUSAL)
def test_cached_greedy_generation(family: str) -> None:
    """Three tokens with a cache are those that a full pass over the text so far prefers."""
    model = tiny(family)
    rows = 1 if family in ONE_ROW_CACHE else 2
    inputs = model.inputs(batch=rows)
    module: Any = model.module
    ids = module.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True
    )
    assert ids.shape == (rows, 12)
    for end in range(9, 12):
        with torch.no_grad():
            scores = module(input_ids=ids[:, :end], use_cache=False).logits[:, -1]
        scores[:, 2] = float("-inf")  # the end token, which min_new_tokens forbids
        assert torch.equal(scores.argmax(-1), ids[:, end])


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "llava", "qwen2_vl"])
def test_generation_from_an_encoder_or_image(family: str) -> None:
    model = tiny(family)
    inputs = model.inputs()
    inputs.pop("decoder_input_ids", None)
    module: Any = model.module
    ids = module.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2


@pytest.mark.parametrize("family", sorted(set(CAUSAL) - OWN_CACHE))
def test_cache_is_returned(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        out: Any = model.module(**model.inputs(), use_cache=True)
    assert {"past_key_values", "cache_params", "state"} & set(out)


def test_attention_is_not_uniform() -> None:
    model = tiny("llama", attn_implementation="eager")
    with torch.no_grad():
        out: Any = model.module(**model.inputs(), output_attentions=True)
    assert torch.stack(out.attentions)[..., -1, :].max(-1).values.mean() > 2 / 9


def test_sliding_window_matters() -> None:
    inputs = tiny("mistral").inputs()
    near, far = (logits_of(tiny("mistral", sliding_window=w), **inputs) for w in (4, 64))
    assert torch.allclose(near[:, :4], far[:, :4], atol=1e-5)
    assert not torch.allclose(near[:, 4:], far[:, 4:], atol=1e-2)


def test_routers_are_spread() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        out: Any = model.module(**model.inputs(), output_router_logits=True)
    chosen = torch.cat(out.router_logits).topk(2).indices
    assert chosen.unique().numel() == 4
    assert torch.cat(out.router_logits).std() > 0.5


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"alibi": True, "parallel_attn": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("t5", {"feed_forward_proj": "gated-gelu"}),
        ("plain_mlp", {"width": 7}),
    ],
)
def test_overrides(family: str, overrides: dict[str, Any]) -> None:
    model = tiny(family, **overrides)
    assert torch.isfinite(logits_of(model, **model.inputs())).all()


def test_refusals() -> None:
    with pytest.raises(SiteNotFound, match="no such family"):
        tiny("gpt5")
    with pytest.raises(UsageError, match="no such setting"):
        tiny("llama", slidng_window=4)
    with pytest.raises(UsageError, match="no such setting"):
        tiny("plain_mlp", depth=4)
    with pytest.raises(UsageError, match="cannot be built"):
        tiny("llava").inputs(length=3)
