"""Blocks that add two parts up, and blocks of which too little is known to claim anything."""

from typing import Any

import pytest
import torch
from torch import nn

import underhood as uh
from underhood.core.check import LAWS
from underhood.core.errors import NotOffered
from underhood.organisms.tiny_families import FAMILY_TABLE

IDS = torch.arange(20, 29)[None]


@pytest.mark.parametrize(
    "family", ["granitemoeshared", "granitemoehybrid", "falcon_h1", "lfm2_moe"]
)
@pytest.mark.parametrize(
    ("site", "before", "after"),
    [("mlp_out", "resid_mid", "resid_post"), ("attn_out", "resid_pre", "resid_mid")],
)
def test_a_part_that_adds_nothing_leaves_the_stream(family, site, before, after):
    """Two modules that are added up are one site: silenced, neither of them is left."""
    model = uh.load(f"random/{family}")
    edit = uh.Edit(f"{site}.1", uh.zero())
    run = model.run(IDS, edits=edit, record=[f"{before}.1", f"{after}.1", f"{site}.1"])
    assert not run[site, 1].any()
    torch.testing.assert_close(run[after, 1], run[before, 1], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["granitemoeshared", "falcon_h1"])
def test_parts_that_are_added_up_are_edited_to_any_value(family):
    model = uh.load(f"random/{family}")
    site = "mlp_out.1" if family == "granitemoeshared" else "attn_out.1"
    wanted = torch.linspace(-1, 1, model.d_model)
    run = model.run(
        IDS, edits=uh.Edit(site, uh.set_to(wanted)), record=["resid_pre", "resid_mid", "resid_post"]
    )
    low, high = (
        ("resid_mid", "resid_post") if site.startswith("mlp") else ("resid_pre", "resid_mid")
    )
    added = run[high, 1] - run[low, 1]
    torch.testing.assert_close(added, wanted.expand_as(added), atol=5e-6, rtol=1e-5)


def test_the_input_of_two_mlps_is_edited_before_both():
    """A zero input leaves nothing of either: both are bilinear in it."""
    model = uh.load("random/granitemoeshared")
    run = model.run(IDS, edits=uh.Edit("mlp_in.1", uh.zero()), record="mlp_out.1")
    assert not run["mlp_out", 1].any()


def _scaled(block: Any) -> None:
    block.some_factor = 0.5


def _gained(block: Any) -> None:
    block.some_gain = nn.Parameter(torch.full((32,), 0.5))


def _extra(block: Any) -> None:
    block.some_part = nn.Linear(32, 32)


class Odd(nn.Module):
    """A block that does one more thing to what the MLP adds."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.some_part: Any
        self.self_attn, self.mlp = inner.self_attn, inner.mlp
        self.input_layernorm = inner.input_layernorm
        self.post_attention_layernorm = inner.post_attention_layernorm

    def run(self, hidden: Any, kwargs: Any) -> tuple[Any, Any]:
        mid = hidden + self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)[0]
        return mid, self.mlp(self.post_attention_layernorm(mid))


class Scaled(Odd):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        mid, out = self.run(hidden_states, kwargs)
        return mid + self.some_factor * out


class Gained(Odd):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        mid, out = self.run(hidden_states, kwargs)
        return mid + self.some_gain * out


class Extra(Odd):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        mid, out = self.run(hidden_states, kwargs)
        return mid + self.some_part(out)


@pytest.mark.parametrize(
    ("kind", "add", "name"),
    [
        (Scaled, _scaled, "some_factor"),
        (Gained, _gained, "some_gain"),
        (Extra, _extra, "some_part"),
    ],
)
def test_what_nobody_knows_is_not_claimed(kind, add, name):
    """A number, a vector or a part with a new name: its sums are refused, not wrong."""
    module: Any = uh.load("random/llama").module
    for i, block in enumerate(module.model.layers):
        module.model.layers[i] = kind(block)
        add(module.model.layers[i])
    model = uh.load(module)
    assert model.anatomy.main is not None
    assert model.anatomy.main.blocks[0].unknown == (name,)
    for site in ("attn_out.0", "mlp_out.1", "resid_mid.1", "head_out.0"):
        with pytest.raises(NotOffered, match="not known"):
            model.run(IDS, record=site)
    report = model.check({"input_ids": IDS})
    assert report.ok, str(report)
    status = {row.name: row.status for row in report.rows}
    assert status["sub-layers add up"] == status["heads add up"] == "not offered"
    assert model.run(IDS, record="z.1")["z", 1].shape == (1, 9, 4, 8)


def test_a_stream_in_lanes_is_no_stream():
    model = uh.load("random/gemma3n")
    assert not model.anatomy.stacks
    with pytest.raises(NotOffered, match="module:"):
        model.run(IDS, record="resid_post.0")


@pytest.mark.parametrize(
    ("family", "site", "says"),
    [
        ("hunyuan_v1_dense", "q.0", "after their rotation"),
        ("llama4", "router_index.0", "experts"),
        ("jetmoe", "pattern.0", "mixtures"),
        ("diffllama", "z.0", "differences"),
        ("minimax", "pattern.0", "recurrence"),
    ],
)
def test_odd_families_are_refused_with_their_reason(family, site, says):
    with pytest.raises(NotOffered, match=says):
        uh.load(f"random/{family}").run(IDS, record=site)


def test_positions_are_counted_where_the_first_layer_keeps_no_keys():
    """MiniMax's cache says it is empty when its first layer is linear attention."""
    model = uh.load("random/minimax")
    edit = uh.Edit("resid_post.1", uh.add(torch.ones(32)), uh.Where(10))
    made = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, edits=edit)
    assert made.fired[0].places == 1


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert_decoder"])
def test_a_head_of_several_layers_is_no_unembedding(family):
    model = uh.load(f"random/{family}")
    with pytest.raises(NotOffered, match="directly"):
        model.unembed(torch.zeros(model.d_model or 32))


@pytest.mark.parametrize("family", ["bart", "falcon_h1", "minicpm3", "hyperclovax"])
def test_the_stream_gives_the_logits(family):
    assert "the last stream gives the logits" in LAWS
    model = uh.load(f"random/{family}")
    ids = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family == "bart" else {})
    prefix = "dec." if family == "bart" else ""
    run = model.run(ids, record=f"{prefix}resid_post.2")
    stream = next(iter(run[s] for s in run.sites))
    torch.testing.assert_close(model.unembed(stream), run.logits, atol=1e-5, rtol=1e-5)


def test_the_embedding_is_scaled_as_the_model_scales_it():
    run = uh.load("random/recurrent_gemma").run(IDS, record=["embed", "resid_pre.0"])
    torch.testing.assert_close(run["embed"], run["resid_pre", 0])


def test_every_family_that_is_not_a_sum_says_so():
    """The guard meets no family whose laws hold: it would hide what is right."""
    unknown = {
        family
        for family, (_, _, kind) in FAMILY_TABLE.items()
        if kind == "causal" and (main := uh.load(f"random/{family}").anatomy.main)
        if any(block.unknown for block in main.blocks)
    }
    assert unknown == {"minimax", "gemma4", "doge"}
