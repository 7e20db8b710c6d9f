"""Direct attribution: the parts sum to the logit difference, and each is what removing it takes."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model

import underhood as uh
from underhood.core.errors import NotOffered, PairError, UsageError
from underhood.data import Pairs, logit_diff
from underhood.methods.read.direct_attribution import direct_attribution
from underhood.organisms import organism
from underhood.view import Result
from underhood.view.doc import Group

# The package holds the function under this name.
MODULE = import_module("underhood.methods.read.direct_attribution")
PAIRS = Pairs(
    ["w10 w20 w30 w40 w50", "w11 w21 w31", "w60 w61 w62 w63"],
    ["w10 w22 w30 w40 w50", "w11 w21 w32", "w60 w61 w62 w64"],
    ["w70", "w71", ["w72", "w74"]],
    ["w80", "w81", "w82"],
)
FAMILIES = (
    "gpt2", "llama", "gemma2", "olmo2", "glm4", "cohere", "granite", "gpt_neox", "mixtral", "mamba",
    "phi", "bloom", "gpt_oss", "deepseek_v3", "jamba", "zamba2", "recurrent_gemma", "rwkv",
)  # fmt: skip


def _views(result: Result) -> list[Any]:
    assert isinstance(result.view, Group)
    return list(result.view.views)


def _town(n: int = 8) -> Pairs:
    return organism("town").pairs("indirect_object", n, seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_logit_difference(family):
    model = random_model(family)
    encoded = PAIRS.encode(model)
    says = logit_diff(model.run(list(PAIRS.clean)).last_logits, encoded.answers, encoded.wrong)
    for split in ("heads", "sublayers"):
        found = direct_attribution(model, PAIRS, split=split)
        total = found["per_row"].sum("node").values
        if "capped_logit_diff" in found.data:  # the sum is that before the soft cap
            assert family in ("gemma2", "recurrent_gemma")
            assert abs(float(found["capped_logit_diff"]) - float(says.mean())) < 1e-4
            assert abs(float(total.mean()) - float(says.mean())) > 1e-4
        else:
            np.testing.assert_allclose(total, says, atol=1e-4)
        assert abs(float(found["total"] - found["logit_diff"])) < 1e-4
        assert float(found["gap"]) < 1e-5


def test_a_part_is_what_its_removal_takes_with_the_norm_frozen():
    """Brute force on the Hugging Face model: cut a part out of the final stream."""
    model = random_model("gpt2")
    found = direct_attribution(model, PAIRS[0]).data.isel(batch=0).sel(layer=1)
    module: Any = model.module
    core = module.transformer
    seen = {}
    block = core.h[1]
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda _m, a: seen.update(z=a[0][0, -1])),
        block.mlp.register_forward_hook(lambda _m, _a, out: seen.update(mlp=out[0, -1])),
        core.ln_f.register_forward_pre_hook(lambda _m, a: seen.update(final=a[0][0, -1])),
    ]
    with torch.no_grad():
        module(model.tokens(PAIRS.clean[0]).ids)
    for hook in hooks:
        hook.remove()
    z, weight = seen["z"].view(4, -1), block.attn.c_proj.weight.view(4, -1, 32)
    parts = {f"a1.h{h}": z[h] @ weight[h] for h in range(4)}
    parts |= {"m1": seen["mlp"], "a1 rest": block.attn.c_proj.bias}
    final, norm = seen["final"].double(), core.ln_f
    scale = (final.var(correction=0) + norm.eps).sqrt()

    unembed = module.lm_head.weight.detach().double()

    @torch.no_grad()
    def difference(stream):
        normed = (stream - stream.mean()) / scale * norm.weight.double() + norm.bias.double()
        logits = unembed @ normed
        return float(logits[70] - logits[80])

    for label, part in parts.items():
        taken = difference(final) - difference(final - part.detach().double())
        assert abs(taken - float(found["per_row"].sel(node=label))) < 1e-5, label


def test_heads_through_a_norm_are_what_their_removal_takes_with_both_norms_frozen():
    model = random_model("olmo2")
    found = direct_attribution(model, PAIRS[0]).data.isel(batch=0)
    module: Any = model.module
    core, seen = module.model, {}
    block = core.layers[0]
    hooks = [
        block.self_attn.o_proj.register_forward_hook(
            lambda _m, a, out: seen.update(z=a[0][0, -1], out=out[0, -1])
        ),
        core.norm.register_forward_pre_hook(lambda _m, a: seen.update(final=a[0][0, -1])),
    ]
    with torch.no_grad():
        module(model.tokens(PAIRS.clean[0]).ids)
    for hook in hooks:
        hook.remove()

    def frozen(norm, x, part):
        scale = (x.double().pow(2).mean() + norm.variance_epsilon).sqrt()
        return part.double() / scale * norm.weight.detach().double()

    z, weight = seen["z"].view(4, -1), block.self_attn.o_proj.weight.detach().T.view(4, -1, 32)
    unembed = module.lm_head.weight.detach().double()
    for head in range(4):
        part = frozen(block.post_attention_layernorm, seen["out"], z[head] @ weight[head])
        value = float(frozen(core.norm, seen["final"], part) @ (unembed[70] - unembed[80]))
        assert abs(value - float(found["per_row"].sel(node=f"a0.h{head}"))) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi"])
def test_sublayers_are_the_sums_of_their_heads(family):
    model = random_model(family)
    heads, whole = (direct_attribution(model, PAIRS, split=s) for s in ("heads", "sublayers"))
    np.testing.assert_allclose(heads["attention"], whole["attention"], atol=1e-5)
    np.testing.assert_allclose(heads["mlp"], whole["mlp"], atol=1e-5)
    assert "heads" not in whole.data


def test_attention_rest_is_there_only_with_biases():
    assert "rest" not in direct_attribution(random_model("llama"), PAIRS)["kind"].values
    kinds = direct_attribution(random_model("gpt2"), PAIRS)["kind"].values
    assert list(kinds).count("rest") == 3
    assert "final norm bias" in kinds


def test_rows_do_not_influence_each_other():
    model = random_model("gpt2")
    together = direct_attribution(model, PAIRS)
    for row in range(3):
        alone = direct_attribution(model, PAIRS[row])
        np.testing.assert_allclose(together["per_row"][row], alone["per_row"][0], atol=1e-5)
    np.testing.assert_allclose(together["contribution"], together["per_row"].mean("batch"))
    np.testing.assert_allclose(together["spread"], together["per_row"].std("batch"))


def test_many_rows_are_cut_into_forwards(monkeypatch):
    model = random_model("gpt2")
    whole = direct_attribution(model, PAIRS)
    monkeypatch.setattr(MODULE, "_ROWS", 2)
    np.testing.assert_allclose(
        direct_attribution(model, PAIRS)["per_row"], whole["per_row"], atol=1e-5
    )


def test_swapping_answers_turns_every_sign():
    model = random_model("phi")
    there = direct_attribution(model, PAIRS)
    back = direct_attribution(model, PAIRS.with_answers(PAIRS.wrong, PAIRS.answers))
    np.testing.assert_allclose(there["per_row"], -back["per_row"], atol=1e-9)


def test_missing_answers_are_the_models_own():
    model = random_model("gpt2")
    bare = Pairs(PAIRS.clean, PAIRS.contrast)
    found = direct_attribution(model, bare)
    answers = model.run(list(bare.clean)).last_logits.argmax(-1)
    logits = model.run(list(bare.contrast)).last_logits.clone()
    logits[torch.arange(3), answers] = -torch.inf
    full = bare.with_answers(answers.tolist(), logits.argmax(-1).tolist())
    np.testing.assert_allclose(found["per_row"], direct_attribution(model, full)["per_row"])
    assert "top token on the contrast" in found.provenance["answers"]
    assert "Answers were not given" in " ".join(_views(found)[0].items)


def test_town_what_writes_most_also_causes_it():
    """Indirect object: exchanging the sub-layer that writes most takes away what it wrote."""
    model, pairs = uh.load(), _town()
    found = direct_attribution(model, pairs)
    written = {"attn_out": found["attention"].values, "mlp_out": found["mlp"].values}
    name = max(written, key=lambda n: written[n].max())
    layer = int(written[name].argmax())
    share = float(written[name][layer])
    assert share > 0.3 * float(found["total"])
    encoded = pairs.encode(model)
    other = model.run(encoded.contrast, record=f"{name}.{layer}")
    patched = model.run(encoded.clean, edits=uh.Edit(f"{name}.{layer}", uh.patch(other), where=-1))
    after = logit_diff(patched.last_logits, encoded.answers, encoded.wrong)
    assert float(after.mean()) < float(found["total"]) - 0.5 * share


def test_view_adds_up_and_shows_the_control(tmp_path):
    model = uh.load()
    found = direct_attribution(model, _town())
    says, parts, grid = _views(found)
    assert abs(sum(parts.values) - float(found["logit_diff"])) < 1e-3
    assert abs(parts.total - float(found["total"])) < 1e-9
    assert f"{float(found['logit_diff']):+.4f}" in says.items[0]
    assert len(parts.baseline) == len(parts.values)
    assert grid.cols == ["H0", "H1", "H2", "H3", "MLP"]
    found.save(tmp_path / "direct")
    assert Result.load(tmp_path / "direct").data.equals(found.data)


def test_many_parts_end_in_one_bar_for_the_others(monkeypatch):
    model = random_model("gpt2")
    nodes = direct_attribution(model, PAIRS).data.sizes["node"]
    for shown, expected in ((nodes, nodes), (nodes - 1, nodes), (5, 6)):
        monkeypatch.setattr(MODULE, "_SHOWN", shown)
        found = direct_attribution(model, PAIRS)
        parts = _views(found)[1]
        assert len(parts.values) == len(parts.baseline) == expected
        assert abs(sum(parts.values) - float(found["total"])) < 1e-9
    assert parts.labels[-1] == f"{nodes - 5} others"


@pytest.mark.parametrize("family", ["bert", "roberta", "bart", "t5", "vit", "plain_mlp"])
def test_refuses_models_whose_stream_is_no_sum(family):
    with pytest.raises(NotOffered):
        direct_attribution(random_model(family), PAIRS)


def test_refuses_when_something_else_writes_to_the_stream():
    model = random_model("llama")
    module: Any = model.module
    module.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 1.01, prepend=True)
    with pytest.raises(NotOffered, match="do not add up"):
        direct_attribution(model, PAIRS)


def test_refuses_bad_requests():
    model = random_model("gpt2")
    with pytest.raises(UsageError):
        direct_attribution(model, PAIRS, random_pairs=0)
    with pytest.raises(PairError):
        direct_attribution(model, Pairs.one("w10 w20", "w10 w20 w30", "w70", "w80"))
    with pytest.raises(PairError, match="others have none"):
        some = Pairs(PAIRS.clean, PAIRS.contrast, list(PAIRS.answers), [["w80"], [], ["w82"]])
        direct_attribution(model, some)
