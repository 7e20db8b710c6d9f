"""Cut edges: both ends are the model's own runs, and what lies between equals a plain forward."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import underhood as uh
from underhood.circuits.graph import Graph
from underhood.circuits.wiring import Wiring
from underhood.core.errors import NotOffered, SiteNotFound
from underhood.organisms.tiny_families import FAMILY_TABLE

ROOT = Path(__file__).parents[2]
# Their blocks norm, scale or split the stream itself, or add what no name tells.
REFUSED = {
    "minimax": "attn_alpha_factor",
    "gemma3n": "no recognisable blocks",
    "gemma4": "layer_scalar",
    "openai": "post-norm",
    "doge": "input_residual",
}
CAUSAL = tuple(name for name, (_, _, kind) in FAMILY_TABLE.items() if kind == "causal")
FAMILIES = tuple(name for name in CAUSAL if name not in REFUSED)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs/architecture.md"])
def test_the_docs_count_the_families_that_are_tested(page: str) -> None:
    said = re.findall(r"\bin (\d+) families", (ROOT / page).read_text(encoding="utf-8"))
    assert said == [str(len(FAMILIES))]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ends_are_the_models_own_runs(family, wiring_of, pairs_of):
    wiring, pairs = wiring_of(family), pairs_of(family)
    clean, contrast = (wiring.writes(side) for side in (pairs.clean, pairs.contrast))
    whole = torch.ones(wiring.graph.real.shape)
    kept = wiring.logits(pairs.clean, contrast, whole)
    cut = wiring.logits(pairs.clean, contrast, whole * 0)
    assert (clean.logits - contrast.logits).abs().max() > 0.1
    torch.testing.assert_close(kept, clean.logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(cut, contrast.logits, atol=2e-5, rtol=1e-5)
    # Clean values into cut edges of the clean run change nothing, whichever are cut.
    make = torch.Generator().manual_seed(1)
    some = torch.rand(wiring.graph.real.shape, generator=make).round()
    null = wiring.logits(pairs.clean, clean, some)
    torch.testing.assert_close(null, clean.logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_a_stream_that_is_no_sum_has_no_edges(family):
    with pytest.raises(NotOffered, match=REFUSED[family]):
        Graph.of(uh.load(f"random/{family}"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_row_has_its_own_mask(family, wiring_of, pairs_of):
    wiring, pairs = wiring_of(family), pairs_of(family)
    contrast = wiring.writes(pairs.contrast)
    make = torch.Generator().manual_seed(2)
    masks = torch.rand(len(pairs), *wiring.graph.real.shape, generator=make).round()
    together = wiring.logits(pairs.clean, contrast, masks)
    for row in range(len(pairs)):
        alone = wiring.logits(pairs.clean.rows([row]), contrast.rows([row]), masks[row])
        torch.testing.assert_close(together[row], alone[0], atol=2e-5, rtol=1e-5)


class PlainLlama:
    """A Llama forward written out, in which every head reads a stream of its own."""

    def __init__(self, module: Any) -> None:
        self.model, self.config = module, module.config

    def norm(self, layer: Any, x: Tensor) -> Tensor:
        return layer.weight * x / (x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon).sqrt()

    def run(self, ids: Tensor, other: Any = None, edges: frozenset[str] = frozenset()) -> Any:
        """Logits at the last token, and what every part writes; `edges` carry `other`'s values."""
        body, writes = self.model.model, {}
        writes["input"] = body.embed_tokens(ids)
        heads, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        cos, sin = body.rotary_emb(writes["input"], torch.arange(ids.shape[1])[None])
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)

        def stream(end: str) -> Tensor:
            parts = [
                other[name] if f"{name}->{end}" in edges else value
                for name, value in writes.items()
            ]
            return torch.stack(parts).sum(0)

        def rotated(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        for number, block in enumerate(body.layers):
            attention, new = block.self_attn, {}
            size = attention.head_dim
            cut = {name: slice(name * size, (name + 1) * size) for name in range(heads)}
            for h in range(heads):
                g = h * kv // heads
                made = []
                for letter, layer, i in (
                    ("q", attention.q_proj, h), ("k", attention.k_proj, g),
                    ("v", attention.v_proj, g),
                ):  # fmt: skip
                    x = self.norm(block.input_layernorm, stream(f"a{number}.h{i}<{letter}>"))
                    made.append(x @ layer.weight[cut[i]].T)
                q, k, v = made
                scores = rotated(q) @ rotated(k).mT / size**0.5 + mask
                z = scores.softmax(-1) @ v
                new[f"a{number}.h{h}"] = z @ attention.o_proj.weight[:, cut[h]].T
            writes |= new
            x = self.norm(block.post_attention_layernorm, stream(f"m{number}"))
            writes[f"m{number}"] = block.mlp(x)
        return self.model.lm_head(self.norm(body.norm, stream("logits")))[:, -1], writes


def test_random_circuits_equal_a_forward_written_out(wiring_of, pairs_of):
    wiring, pairs = wiring_of("llama"), pairs_of("llama")
    plain = PlainLlama(wiring.model.module)
    graph = wiring.graph
    with torch.no_grad():
        whole, _ = plain.run(pairs.clean.ids)
        _, other = plain.run(pairs.contrast.ids)
    contrast = wiring.writes(pairs.contrast)
    torch.testing.assert_close(whole, wiring.writes(pairs.clean).logits, atol=2e-5, rtol=1e-5)
    make = torch.Generator().manual_seed(3)
    for share in (0.02, 0.3, 0.7, 0.97):
        keep = torch.rand(graph.real.shape, generator=make) < share
        cut = frozenset(graph.names(~keep))
        with torch.no_grad():
            truth, _ = plain.run(pairs.clean.ids, other, cut)
        found = wiring.logits(pairs.clean, contrast, keep.float())
        torch.testing.assert_close(found, truth, atol=3e-5, rtol=1e-5)


def test_padding_on_either_side_changes_nothing():
    wiring = Wiring(uh.load())
    model = wiring.model
    prompts = ["the capital of France is", "Mary and John went to the store , John gave a drink to"]
    others = ["the capital of Japan is", "Mary and John went to the store , Mary gave a drink to"]
    make = torch.Generator().manual_seed(4)
    keep = torch.rand(wiring.graph.real.shape, generator=make).round()
    alone = torch.cat([
        wiring.logits(model.tokens(a), wiring.writes(model.tokens(b)), keep)
        for a, b in zip(prompts, others, strict=True)
    ])  # fmt: skip
    for side in ("left", "right"):
        tokens = model.tokens(prompts, padding=side)
        contrast = wiring.writes(model.tokens(others, padding=side))
        found = wiring.logits(tokens, contrast, keep)
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_no_hook_is_left(wiring_of, pairs_of):
    wiring, pairs = wiring_of("llama"), pairs_of("llama")
    contrast = wiring.writes(pairs.contrast)
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks)
                 for m in wiring.model.module.modules())  # fmt: skip
    wiring.logits(pairs.clean, contrast, torch.zeros(wiring.graph.real.shape))
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks)
                for m in wiring.model.module.modules())  # fmt: skip
    assert before == after


@pytest.mark.parametrize("family", ["bert", "t5", "plain_mlp"])
def test_models_without_edges_are_refused(family):
    with pytest.raises(NotOffered, match="edges are"):
        Graph.of(uh.load(f"random/{family}"))


def test_edges_have_names_that_are_found_again(wiring_of):
    graph = wiring_of("llama").graph
    names = graph.names(graph.real)
    assert len(names) == len(set(names)) == graph.n_edges
    assert all(graph.edge(*graph.find(name)) == name for name in names[::7])
    with pytest.raises(SiteNotFound, match="no node 'a0.h9'"):
        graph.find("a0.h9->logits")
    with pytest.raises(SiteNotFound, match="does not come before"):
        graph.find("m2->a0.h0<q>")


def test_gpt2_small_has_the_published_number_of_edges():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=12, n_head=12, n_embd=24, vocab_size=100, n_positions=16)
    assert Graph.of(uh.load(GPT2LMHeadModel(config))).n_edges == 32_491


def test_a_part_that_nobody_knows_is_noticed():
    """A block that rescales its stream: the parts no longer sum, and the first run says so."""
    model = uh.load("random/llama")
    block = model.module.get_submodule("model.layers.1")

    def louder(_module: Any, _inputs: Any, out: Any) -> Any:
        return out * 1.1

    handle = block.register_forward_hook(louder)
    try:
        with pytest.raises(NotOffered, match="not the sum of what its known parts write"):
            Wiring(model).writes(model.text.of_ids(torch.arange(8, 16)[None], None))
    finally:
        handle.remove()
