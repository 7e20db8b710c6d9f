"""Edge attribution against the derivative of a mask, exact effects, and grouped heads' sums."""

from typing import Any

import pytest
import torch

import underhood as uh
from underhood.circuits.ablation import Ablation
from underhood.circuits.exact import edge_effects
from underhood.circuits.gradients import TOGETHER, Attributor
from underhood.circuits.light import light, written_out
from underhood.circuits.score import METHODS, edge_scores
from underhood.circuits.wiring import Wiring, Writes
from underhood.core.errors import NotFinite, UsageError
from underhood.data import EncodedPairs

LAST = 6
ADDITIVE = (
    "gpt2", "gpt_neox", "gptj", "bloom", "falcon", "opt", "codegen", "llama", "mistral", "mixtral",
    "qwen3", "qwen3_next", "gemma", "gpt_oss", "deepseek_v3", "olmo", "phi", "phi3", "cohere",
    "granite", "persimmon", "mamba", "jamba", "recurrent_gemma",
)  # fmt: skip


@pytest.mark.parametrize("family", ADDITIVE)
def test_eap_is_the_derivative_of_the_mask(family, wiring_of, pairs_of, metric):
    wiring, pairs = wiring_of(family), pairs_of(family)
    cut = Ablation(wiring, pairs, "resample", 8)
    found = Attributor(wiring, metric).scores(pairs, cut, at="clean")
    keep = torch.ones(wiring.graph.real.shape, requires_grad=True)
    logits = wiring.logits(pairs.clean, wiring.writes(pairs.contrast), keep, grad=True)
    value = metric(logits, pairs.answers, pairs.wrong).sum()
    truth = torch.autograd.grad(value, keep)[0].double() * wiring.graph.real
    assert truth.abs().max() > 0.1
    torch.testing.assert_close(found, truth, atol=1e-4 * float(truth.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(("family", "embedded"), [
    ("gpt2", "transformer.drop"), ("gpt_neox", "gpt_neox.embed_in"),
    ("llama", "model.embed_tokens"), ("mixtral", "model.embed_tokens"),
    ("cohere", "model.embed_tokens"), ("phi", "model.embed_tokens"),
])  # fmt: skip
def test_eap_ig_is_the_mean_of_masks_along_the_line(family, embedded, wiring_of, pairs_of, metric):
    """Each step's mask has what the two runs differ by at its other end; more than one batch."""
    wiring, pairs, steps = wiring_of(family), pairs_of(family), TOGETHER + 2
    module = wiring.model.module.get_submodule(embedded)
    clean, contrast = (wiring.writes(t) for t in (pairs.clean, pairs.contrast))
    truth = torch.zeros(wiring.graph.real.shape, dtype=torch.float64)
    for step in range(steps):
        ends = contrast.values[0], clean.values[0]
        value = ends[0] + step / steps * (ends[1] - ends[0])
        handle = module.register_forward_hook(lambda *_, value=value: value)
        now = wiring.writes(pairs.clean)
        all_three = zip(now.values, contrast.values, clean.values, strict=True)
        other = Writes([n + (b - a) for n, b, a in all_three], now.logits)
        keep = torch.ones(wiring.graph.real.shape, requires_grad=True)
        logits = wiring.logits(pairs.clean, other, keep, grad=True)
        handle.remove()
        summed = metric(logits, pairs.answers, pairs.wrong).sum()
        truth += torch.autograd.grad(summed, keep)[0].double() * wiring.graph.real / steps
    cut = Ablation(wiring, pairs, "resample", 8)
    found = Attributor(wiring, metric).scores(pairs, cut, at="inputs", steps=steps)
    assert truth.abs().max() > 0.1
    torch.testing.assert_close(found, truth, atol=1e-4 * float(truth.abs().max()), rtol=1e-3)


def test_projections_that_are_changed_in_place(pairs_of, metric):
    """OLMo clips its queries, keys and values where they lie."""
    wiring, pairs = Wiring(uh.load("random/olmo", clip_qkv=0.05)), pairs_of("olmo")
    found = Attributor(wiring, metric).scores(pairs, Ablation(wiring, pairs, "resample", 8))
    keep = torch.ones(wiring.graph.real.shape, requires_grad=True)
    logits = wiring.logits(pairs.clean, wiring.writes(pairs.contrast), keep, grad=True)
    value = metric(logits, pairs.answers, pairs.wrong).sum()
    truth = torch.autograd.grad(value, keep)[0].double() * wiring.graph.real
    torch.testing.assert_close(found, truth, atol=1e-4 * float(truth.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(
    ("at", "forward", "backward"),
    [("clean", 1, 1), ("contrast", 1, 1), ("both", 1, 2), ("inputs", 1, 5)],
)
def test_a_run_that_gradients_are_taken_at_is_not_run_twice(
    at, forward, backward, wiring_of, pairs_of, metric
):
    wiring, pairs = wiring_of("llama"), pairs_of("llama")
    attributor = Attributor(wiring, metric)
    attributor.scores(pairs, Ablation(wiring, pairs, "resample", 8), at=at)
    prefix = 1
    assert attributor.passes == [prefix + forward + backward, backward]


def test_an_activation_in_several_steps_keeps_one_tensor(wiring_of):
    """GPT-2's is written out; of x, its cube, a tanh and their products only a slope is kept."""
    model = wiring_of("gpt2").model
    activations = written_out(model)
    assert activations == [block.mlp.act for block in model.module.transformer.h]
    x = torch.randn(2, 3, 16, requires_grad=True)
    plain = activations[0](x)
    with light(activations):
        y = activations[0](x)
    assert torch.equal(y, plain)
    assert (len(_kept(plain)), len(_kept(y))) == (4, 1)
    found, truth = (torch.autograd.grad(v.pow(2).sum(), x)[0] for v in (y, plain))
    torch.testing.assert_close(found, truth)


def _kept(value: torch.Tensor) -> set[int]:
    """The tensors of its size that a value's graph keeps for the backward pass."""
    found: set[int] = set()
    nodes: list[Any] = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        saved = [getattr(node, n) for n in dir(node) if n.startswith("_saved_")]
        found |= {t.data_ptr() for t in saved if isinstance(t, torch.Tensor) and t.numel() > 1}
        nodes += [after for after, _ in node.next_functions if after is not None]
    return found


def test_projections_of_a_reader_are_no_copies(wiring_of):
    for family, name in (("gpt2", "h.1.attn.c_attn"), ("llama", "layers.1.self_attn.q_proj")):
        wiring = wiring_of(family)
        reader = next(r for r in wiring.graph.readers if r.module.endswith(name) and r.kind == "q")
        module = wiring.model.module.get_submodule(reader.module)
        weight, _ = reader.weight(wiring.model)
        assert weight.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "glm4"])
def test_heads_under_a_norm_add_up(family, wiring_of, pairs_of, metric):
    """Their scores sum to that of the whole attention, whose output enters the stream as it is."""
    wiring, pairs = wiring_of(family), pairs_of(family)
    clean, contrast = (wiring.writes(t) for t in (pairs.clean, pairs.contrast))
    for number, writer in enumerate(wiring.graph.writers):
        if writer.kind != "heads":
            continue
        parts = [wiring.additive(number, w.values[number]).sum(2) for w in (clean, contrast)]
        for tokens, part in zip((pairs.clean, pairs.contrast), parts, strict=True):
            run = wiring.model.run(tokens, record=[f"attn_out.{writer.layer}"])
            torch.testing.assert_close(part, run[f"attn_out.{writer.layer}"], atol=1e-4, rtol=1e-4)


def test_grouped_keys_and_values_are_sums_of_ungrouped_ones(wiring_of, pairs_of, metric):
    """The same model with every key/value head copied for each query head."""
    grouped, pairs = wiring_of("llama"), pairs_of("llama")
    config = grouped.model.module.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    model = uh.load("random/llama", num_key_value_heads=heads)
    weights = dict(grouped.model.module.state_dict())
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            each = weight.unflatten(0, (kv, -1)).repeat_interleave(heads // kv, 0)
            weights[name] = each.flatten(0, 1)
    model.module.load_state_dict(weights)
    single = Wiring(model)
    cut = [Ablation(w, pairs, "resample", 8) for w in (grouped, single)]
    ours = Attributor(grouped, metric).scores(pairs, cut[0])
    theirs = Attributor(single, metric).scores(pairs, cut[1])
    for number, name in enumerate(grouped.graph.destinations):
        if name.endswith(("<k>", "<v>")):
            layer, head = name[:-3].split(".h")
            group = heads // kv
            names = [f"{layer}.h{int(head) * group + i}{name[-3:]}" for i in range(group)]
            summed = sum(theirs[:, single.graph.destinations.index(n)] for n in names)
        else:
            summed = theirs[:, single.graph.destinations.index(name)]
        torch.testing.assert_close(ours[:, number], summed, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("by", [m for m in METHODS if m != "random"])
def test_scores_do_not_depend_on_the_size_of_a_pass(by, wiring_of, pairs_of, metric):
    wiring, pairs = wiring_of("llama"), pairs_of("llama", 2 if by == "exact" else 5)
    alone = edge_scores(
        wiring, pairs, metric, method=by, steps=2, batch_size=1 if by != "exact" else 16
    )
    together = edge_scores(
        wiring, pairs, metric, method=by, steps=2, batch_size=8 if by != "exact" else 64
    )
    assert alone.values.abs().max() > 1e-3
    torch.testing.assert_close(alone.values, together.values, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma2", "phi", "gpt_neox", "olmo2", "mixtral", "opt", "mamba"]
)
def test_exact_effects_are_those_of_one_mask_per_edge(family, wiring_of, pairs_of, metric):
    wiring, pairs = wiring_of(family), pairs_of(family, 2)
    every = wiring.graph.real.nonzero().tolist()
    edges = [(int(u), int(v)) for u, v in every[:: max(1, len(every) // 60)]]
    found = edge_effects(wiring, pairs, metric, edges).values
    contrast = wiring.writes(pairs.contrast)
    base = metric(wiring.writes(pairs.clean).logits, pairs.answers, pairs.wrong)
    for row in range(2):
        keep = torch.ones(len(edges), *wiring.graph.real.shape)
        for number, edge in enumerate(edges):
            keep[number][edge] = 0
        rows = [row] * len(edges)
        logits = wiring.logits(pairs.clean.rows(rows), contrast.rows(rows), keep)
        value = metric(logits, pairs.answers[rows], pairs.wrong[rows])
        truth = (base[row] - value).double()
        torch.testing.assert_close(found[:, row], truth, atol=3e-5, rtol=1e-3)


def test_nothing_differs_nothing_scores(wiring_of, pairs_of, metric):
    wiring, pairs = wiring_of("llama"), pairs_of("llama")
    same = EncodedPairs(pairs.clean, pairs.clean, pairs.answers, pairs.wrong, [LAST] * len(pairs))
    for by in ("eap", "eap-ig", "exact"):
        assert not edge_scores(wiring, same, metric, method=by).values.any()


def test_lines_need_a_contrast(wiring_of, pairs_of, metric):
    with pytest.raises(UsageError, match="no meaning under mean ablation"):
        edge_scores(wiring_of("llama"), pairs_of("llama"), metric, method="eap-ig", ablation="mean")
    found = edge_scores(
        wiring_of("llama"), pairs_of("llama"), metric, method="eap", ablation="mean"
    )
    assert found.how["ablation"] == "mean"


def test_weights_keep_their_flags_after_an_error(wiring_of, pairs_of, metric):
    wiring, pairs = wiring_of("gpt2"), pairs_of("gpt2")
    flags = [p.requires_grad for p in wiring.model.module.parameters()]
    weight = wiring.model.module.transformer.h[1].mlp.c_fc.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(NotFinite):
            edge_scores(wiring, pairs, metric, method="eap")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert flags == [p.requires_grad for p in wiring.model.module.parameters()]
