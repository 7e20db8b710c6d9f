"""Experts as nodes: what they write, and cuts against hooks written by hand."""

from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import underhood as uh
from underhood.circuits import Circuit, Graph, Scores, Wiring, write_mib
from underhood.circuits.exact import edge_effects
from underhood.core.errors import NotOffered, SiteNotFound, UsageError

MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "gpt_oss", "deepseek_v3", "jamba",
)  # fmt: skip
SHARED = ("qwen2_moe", "qwen3_next", "deepseek_v3")
FREE = pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
EVERY = pytest.mark.parametrize("family", MIXTURES)


@cache
def _split(model: uh.Model, freeze: bool) -> Wiring:
    return Wiring(model, Graph.of(model, experts=True), freeze_routing=freeze)


@pytest.fixture(scope="session")
def split_of(wiring_of):
    """A tiny random mixture's wiring with experts as nodes: `(family, freeze)`."""
    return lambda family, freeze=False: _split(wiring_of(family).model, freeze)


# Nodes -------------------------------------------------------------------------------------------


def test_experts_and_routers_are_nodes(split_of, wiring_of):
    graph = split_of("deepseek_v3").graph
    mine = [name for name in graph.sources if name.startswith("m")]
    parts = ("e0", "e1", "e2", "e3", "s")
    experts = [f"m{layer}.{part}" for layer in (1, 2) for part in parts]
    assert mine == ["m0", *experts]
    read = [name for name in graph.destinations if name.startswith("m")]
    assert read == ["m0", "m1", "m1<router>", "m2", "m2<router>"]
    assert graph.real[graph.find("m1.e3->m2<router>")]
    with pytest.raises(SiteNotFound, match="does not come before"):
        graph.find("m1.e3->m1<router>")
    assert "m1.s" not in split_of("mixtral").graph.sources
    assert Graph.of(wiring_of("mixtral").model).sources == wiring_of("mixtral").graph.sources
    assert "m1" in wiring_of("mixtral").graph.sources


def test_a_router_feeds_its_experts_and_not_the_rest(split_of):
    graph = split_of("qwen2_moe").graph
    feeds = {
        destination: [graph.sources[i] for i in graph.feeds[number].nonzero()[:, 0].tolist()]
        for number, destination in enumerate(graph.destinations)
    }
    experts = [f"m1.e{k}" for k in range(4)]
    assert feeds["m1"] == [*experts, "m1.s"] and feeds["m1<router>"] == experts
    routed = Circuit.of(graph, ["input->m1<router>", "m1.e2->logits", "m1.s->logits"]).pruned()
    assert routed.edges == ["input->m1<router>", "m1.e2->logits"]


@EVERY
def test_experts_and_rest_sum_to_what_the_mlp_adds(family, split_of, pairs_of):
    wiring, tokens = split_of(family), pairs_of(family).clean
    model, now = wiring.model, wiring.writes(tokens)
    writers = [w for w in wiring.graph.writers if w.kind == "experts"]
    assert writers and all(w.rest == (family in SHARED) for w in writers)
    for writer in writers:
        layer, number = writer.layer, wiring.graph.writers.index(writer)
        count = writer.heads - writer.rest
        record = [f"mlp_out.{layer}", *(f"expert_out.{layer}.{k}" for k in range(count))]
        run = model.run(tokens, record=[*record, f"router_index.{layer}"])
        parts = wiring.split(number, now.values[number])
        torch.testing.assert_close(parts.sum(2), run[f"mlp_out.{layer}"], atol=1e-5, rtol=1e-5)
        for k in range(count):
            torch.testing.assert_close(parts[:, :, k], run[f"expert_out.{layer}.{k}"])
            chosen = (run[f"router_index.{layer}"] == k).any(-1)
            assert torch.equal(parts[:, :, k].any(-1), chosen)


@pytest.mark.parametrize(("family", "path"), [
    ("qwen2_moe", "model.layers.1.mlp"), ("deepseek_v3", "model.layers.2.mlp"),
])  # fmt: skip
def test_the_rest_is_the_shared_expert(family, path, split_of, pairs_of):
    wiring, tokens = split_of(family), pairs_of(family).clean
    layer = int(path.split(".")[2])
    mlp: Any = wiring.model.module.get_submodule(path)
    read = wiring.model.run(tokens, record=f"module_in:{path}")[f"module_in:{path}"]
    with torch.no_grad():
        if family == "qwen2_moe":
            shared = mlp.shared_expert_gate(read).sigmoid() * mlp.shared_expert(read)
        else:
            shared = mlp.shared_experts(read)
    number = next(i for i, w in enumerate(wiring.graph.writers)
                  if w.kind == "experts" and w.layer == layer)  # fmt: skip
    found = wiring.split(number, wiring.writes(tokens).values[number])[:, :, -1]
    torch.testing.assert_close(found, shared, atol=1e-5, rtol=1e-5)


# Cuts --------------------------------------------------------------------------------------------


@FREE
@EVERY
def test_both_ends_are_the_models_own_runs(family, freeze, split_of, pairs_of):
    wiring, pairs = split_of(family, freeze), pairs_of(family)
    clean, contrast = (wiring.writes(side) for side in (pairs.clean, pairs.contrast))
    whole = torch.ones(wiring.graph.real.shape)
    kept = wiring.logits(pairs.clean, contrast, whole)
    cut = wiring.logits(pairs.clean, contrast, whole * 0)
    assert (clean.logits - contrast.logits).abs().max() > 0.1
    torch.testing.assert_close(kept, clean.logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(cut, contrast.logits, atol=2e-5, rtol=1e-5)
    make = torch.Generator().manual_seed(1)
    some = torch.rand(wiring.graph.real.shape, generator=make).round()
    null = wiring.logits(pairs.clean, clean, some)
    torch.testing.assert_close(null, clean.logits, atol=2e-5, rtol=1e-5)


@EVERY
def test_experts_and_router_cut_alike_are_the_whole_mixture(family, split_of, wiring_of, pairs_of):
    """The graph of whole mixtures is the one of experts with equal masks for all parts of one."""
    whole, parts, pairs = wiring_of(family), split_of(family), pairs_of(family)
    make = torch.Generator().manual_seed(2)
    keep = torch.rand(whole.graph.real.shape, generator=make).round()
    rows, columns = _owners(whole.graph, parts.graph)
    contrast = [w.writes(pairs.contrast) for w in (whole, parts)]
    truth = whole.logits(pairs.clean, contrast[0], keep)
    found = parts.logits(pairs.clean, contrast[1], keep[rows][:, columns])
    assert (truth - whole.writes(pairs.clean).logits).abs().max() > 0.1
    torch.testing.assert_close(found, truth, atol=3e-5, rtol=1e-5)


def _owners(whole: Graph, parts: Graph) -> tuple[Tensor, Tensor]:
    """For each node of the finer graph, the node of the other that it belongs to."""
    rows = [whole.sources.index(n.split(".e")[0].removesuffix(".s")) for n in parts.sources]
    ends = [whole.destinations.index(n.removesuffix("<router>")) for n in parts.destinations]
    return torch.tensor(rows), torch.tensor(ends)


class HookedMixtral:
    """Mixtral with plain torch hooks: what expert and head write, and streams of one's own."""

    def __init__(self, module: Any) -> None:
        self.module, self.layers = module, module.model.layers

    def run(self, ids: Tensor, moved: dict[str, Tensor] | None = None) -> SimpleNamespace:
        """Logits at the last token, streams before MLPs, what parts write, what routers chose.

        Args:
            ids: The prompts.
            moved: By destination, what its stream has more.
        """
        moved, seen, handles = moved or {}, SimpleNamespace(streams={}, writes={}, chosen={}), []
        for number, layer in enumerate(self.layers):
            handles += self._hook(number, layer, moved, seen)
        norm = self.module.model.norm
        extra = moved.get("logits", torch.zeros(()))
        handles.append(norm.register_forward_pre_hook(lambda _m, args: (args[0] + extra,)))
        with torch.no_grad():
            seen.logits = self.module(ids).logits[:, -1]
        for handle in handles:
            handle.remove()
        return seen

    def _hook(self, number: int, layer: Any, moved: dict[str, Tensor], seen: Any) -> list[Any]:
        norm = layer.post_attention_layernorm

        def stream(_m: Any, args: Any) -> None:
            seen.streams[number] = args[0].clone()

        def own(destination: str, like: Tensor) -> Tensor:
            x = seen.streams[number] + moved.get(destination, torch.zeros(()))
            scale = (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            return (norm.weight * x / scale).reshape(like.shape)

        def router(_m: Any, args: Any, out: Any) -> None:
            shape = (*seen.streams[number].shape[:2], -1)
            seen.chosen[number] = out[2].view(shape)
            hidden = own(f"m{number}", args[0])
            for k in range(layer.mlp.experts.num_experts):
                up = layer.mlp.experts.gate_up_proj[k]
                gate, value = (hidden @ up.T).chunk(2, -1)
                made = (layer.mlp.experts.act_fn(gate) * value) @ layer.mlp.experts.down_proj[k].T
                weight = (out[1] * (out[2] == k)).sum(-1, keepdim=True)
                seen.writes[f"m{number}.e{k}"] = (made * weight).view(shape)

        def heads(_m: Any, args: Any) -> None:
            size = layer.self_attn.head_dim
            for h, z in enumerate(args[0].split(size, -1)):
                weight = layer.self_attn.o_proj.weight[:, h * size : (h + 1) * size]
                seen.writes[f"a{number}.h{h}"] = z @ weight.T

        def before_mlp(_m: Any, args: Any) -> Any:
            return (own(f"m{number}", args[0]),)

        def before_router(_m: Any, args: Any) -> Any:
            return (own(f"m{number}<router>", args[0]),)

        return [
            norm.register_forward_pre_hook(stream),
            layer.mlp.register_forward_pre_hook(before_mlp),
            layer.mlp.gate.register_forward_pre_hook(before_router),
            layer.mlp.gate.register_forward_hook(router),
            layer.self_attn.o_proj.register_forward_pre_hook(heads),
        ]


@pytest.mark.parametrize("source", ["a0.h1", "m0.e1", "m0.e2", "a1.h2"])
@pytest.mark.parametrize("end", ["m1", "m1<router>", "m2", "m2<router>", "logits"])
def test_one_cut_is_a_hook_written_by_hand(source, end, split_of, pairs_of, metric):
    wiring, pairs = split_of("mixtral"), pairs_of("mixtral", 5)
    plain = HookedMixtral(wiring.model.module)
    clean, contrast = (plain.run(side.ids) for side in (pairs.clean, pairs.contrast))
    moved = contrast.writes[source] - clean.writes[source]
    truth = plain.run(pairs.clean.ids, {end: moved})
    edge = f"{source}->{end}"
    keep = 1 - wiring.graph.mask([edge]).float()
    found = wiring.logits(pairs.clean, wiring.writes(pairs.contrast), keep)
    assert (truth.logits - clean.logits).abs().max() > 1e-4
    torch.testing.assert_close(found, truth.logits, atol=2e-5, rtol=1e-5)
    effects = edge_effects(wiring, pairs, metric, [wiring.graph.find(edge)]).values[0]
    before, after = (metric(x.logits, pairs.answers, pairs.wrong) for x in (clean, truth))
    torch.testing.assert_close(effects.float(), before - after, atol=3e-5, rtol=1e-3)


def test_a_cut_edge_changes_who_is_chosen_unless_routing_is_frozen(split_of, pairs_of):
    """The hand-written run chooses others; the frozen one gives them the clean run's weights."""
    free, frozen, pairs = (split_of("mixtral"), split_of("mixtral", True), pairs_of("mixtral", 5))
    plain = HookedMixtral(free.model.module)
    clean, contrast = (plain.run(side.ids) for side in (pairs.clean, pairs.contrast))
    moved = contrast.writes["a0.h1"] - clean.writes["a0.h1"]
    hit = plain.run(pairs.clean.ids, {"m1<router>": moved})
    assert not torch.equal(hit.chosen[1], clean.chosen[1])
    other = free.writes(pairs.contrast)
    into = {end: 1 - free.graph.mask([f"a0.h1->{end}"]).float() for end in ("m1", "m1<router>")}
    held = frozen.logits(pairs.clean, other, into["m1<router>"])
    torch.testing.assert_close(held, clean.logits, atol=2e-5, rtol=1e-5)
    routers = [layer.mlp.gate for layer in free.model.module.model.layers]
    outs: list[Any] = []
    for router in routers:
        handle = router.register_forward_hook(lambda _m, _a, out: outs.append(out))
        with torch.no_grad():
            free.model.module(pairs.clean.ids)
        handle.remove()
    handles = [router.register_forward_hook(lambda _m, _a, _o, out=out: out)
               for router, out in zip(routers, outs, strict=True)]  # fmt: skip
    truth = plain.run(pairs.clean.ids, {"m1": moved})
    for handle in handles:
        handle.remove()
    found = frozen.logits(pairs.clean, other, into["m1"])
    torch.testing.assert_close(found, truth.logits, atol=2e-5, rtol=1e-5)
    assert (free.logits(pairs.clean, other, into["m1"]) - found).abs().max() > 1e-4


def test_padding_changes_nothing(split_of):
    for freeze in (False, True):
        wiring = split_of("deepseek_v3", freeze)
        text = wiring.model.text
        make = torch.Generator().manual_seed(4)
        rows = [torch.randint(8, 99, (2, 1, n), generator=make).unbind(0) for n in (5, 8)]
        keep = torch.rand(wiring.graph.real.shape, generator=make).round()
        alone = torch.cat([
            wiring.logits(text.of_ids(a, None), wiring.writes(text.of_ids(b, None)), keep)
            for a, b in rows
        ])  # fmt: skip
        sides = [torch.stack([torch.nn.functional.pad(pair[i][0], (8 - pair[i].shape[1], 0))
                              for pair in rows]) for i in (0, 1)]  # fmt: skip
        mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
        clean, contrast = (text.of_ids(ids, mask) for ids in sides)
        found = wiring.logits(clean, wiring.writes(contrast), keep)
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


# Refusals ----------------------------------------------------------------------------------------


def test_what_has_no_experts_is_refused(wiring_of, split_of, tmp_path):
    llama = wiring_of("llama").model
    with pytest.raises(NotOffered, match="no experts"):
        Graph.of(llama, experts=True)
    with pytest.raises(NotOffered, match="no routing to freeze"):
        Wiring(llama, freeze_routing=True)
    graph = split_of("mixtral").graph
    scores = Scores(graph, torch.zeros(graph.real.shape))
    with pytest.raises(NotOffered, match="experts=False"):
        write_mib(split_of("mixtral").model, scores, None, tmp_path / "x.json")


@pytest.mark.parametrize("field", ["router", "experts"])
def test_mixtures_that_cannot_be_tapped_are_refused(field):
    model = uh.load("random/mixtral")
    spec = model.anatomy.stacks[""].blocks[1].experts
    object.__setattr__(spec, field, None)
    with pytest.raises(NotOffered, match=r"layer 1[\s\S]*experts=False"):
        Graph.of(model, experts=True)
    assert Graph.of(model).sources == Graph.of(uh.load("random/mixtral")).sources


def test_what_a_mixture_does_not_say_is_found_out(pairs_of):
    """A router that reads something else, or an MLP that adds more than its experts."""
    model = uh.load("random/mixtral")
    mlp: Any = model.module.get_submodule("model.layers.1.mlp")
    tokens = pairs_of("mixtral").clean

    def forward(x: Tensor, times: float, more: float) -> Tensor:
        flat = x.flatten(0, 1)
        _, weights, index = mlp.gate(flat * times)
        return mlp.experts(flat, index, weights).view(x.shape) + more

    changes = {
        (1.0, 0.0): "",
        (1.0, 1.0): "adds more",
        (2.0, 0.0): "does not read what its experts",
    }
    for (times, more), why in changes.items():
        mlp.forward = lambda x, times=times, more=more: forward(x, times, more)
        wiring = Wiring(model, Graph.of(model, experts=True))
        with pytest.raises(NotOffered, match=why) if why else nullcontext():
            wiring.writes(tokens)


def _granite(name: str, **options: Any) -> Wiring:
    sizes: dict[str, Any] = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 4,
        "num_experts_per_tok": 2, "residual_multiplier": 0.5,
    }  # fmt: skip
    module = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**sizes, **options)
    )
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=make) * 0.2)
    model = uh.load(module)
    return Wiring(model, Graph.of(model, experts=True))


def test_a_block_may_scale_its_mixture():
    """Granite multiplies what the MLP adds: the experts' shares too."""
    wiring = _granite("GraniteMoe")
    make = torch.Generator().manual_seed(1)
    clean, contrast = (wiring.model.text.of_ids(ids, None)
                       for ids in torch.randint(8, 99, (2, 3, 7), generator=make))  # fmt: skip
    whole = torch.ones(wiring.graph.real.shape)
    other, own = wiring.writes(contrast), wiring.writes(clean)
    cut = wiring.logits(clean, other, whole * 0)
    torch.testing.assert_close(wiring.logits(clean, other, whole), own.logits)
    torch.testing.assert_close(cut, other.logits, atol=2e-5, rtol=1e-5)
    number = next(i for i, w in enumerate(wiring.graph.writers) if w.kind == "experts")
    parts = wiring.split(number, own.values[number]).sum(2)
    torch.testing.assert_close(parts, wiring.model.run(clean, record="mlp_out.0")["mlp_out", 0])


def test_what_stands_beside_a_mixture_is_found_out(pairs_of):
    with pytest.raises(NotOffered, match="another module, stands between the experts"):
        _granite("GraniteMoeShared", shared_intermediate_size=20).writes(pairs_of("mixtral").clean)


def test_half_precision_is_no_reason_to_refuse(pairs_of):
    model = uh.load(uh.load("random/mixtral").module.bfloat16())
    with torch.no_grad():  # a stream far larger than what is added to it
        dict(model.module.named_parameters())["model.embed_tokens.weight"].mul_(100)
    wiring = Wiring(model, Graph.of(model, experts=True))
    assert wiring.writes(pairs_of("mixtral").clean).logits.dtype == torch.bfloat16


# In the core -------------------------------------------------------------------------------------


def test_a_function_learns_which_expert_a_slot_belongs_to(wiring_of, pairs_of):
    """Silencing one expert by its number equals the edit at the expert's own site."""
    model, tokens = wiring_of("mixtral").model, pairs_of("mixtral").clean

    def silence(h: Tensor, experts: Tensor) -> Tensor:
        return torch.where((experts == 2)[..., None], 0.0, h)

    quiet = (
        uh.Edit("expert_out.1", uh.call(silence, slots=True)),
        uh.Edit("expert_out.1.2", uh.zero()),
    )
    found, truth = (model.run(tokens, edits=edit).last_logits for edit in quiet)
    assert (truth - model.run(tokens).last_logits).abs().max() > 1e-3
    assert torch.equal(found, truth)
    rows = uh.Where(rows=1)
    one = model.run(tokens, edits=uh.Edit("expert_out.1", uh.call(silence, slots=True), rows))
    torch.testing.assert_close(one.last_logits[1], truth[1])
    with pytest.raises(UsageError, match="expert_out"):
        uh.Edit("mlp_out.1", uh.call(silence, slots=True))
