"""Contextual decomposition: parts sum to the activation, linear truth, the rules written out."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from torch import Tensor

import underhood as uh
from underhood.circuits.decomposition import Decomposition
from underhood.circuits.wiring import Wiring
from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.core.site import Site
from underhood.data import EncodedPairs, Pairs, metric_named
from underhood.methods.locate.contextual_decomposition import contextual_decomposition
from underhood.organisms import wired
from underhood.view import Result

FAMILIES = ("gpt2", "llama", "gemma2", "phi", "qwen3", "mixtral", "olmo2", "cohere", "granite")
DIFF = metric_named("logit_diff")


@cache
def wiring_of(family: str) -> Wiring:
    wiring = Wiring(random_model(family))
    # Biases that start at zero would hide what becomes of them.
    make = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in wiring.model.module.named_parameters():
            if name.endswith("bias") and not bool(weight.any()):
                weight += 0.3 * torch.randn(weight.shape, generator=make)
    return Wiring(wiring.model)


def random_pairs(n: int = 3, length: int = 6) -> Pairs:
    rng = np.random.default_rng(0)
    rows = rng.integers(10, 60, (n, length))
    clean = [" ".join(f"w{w}" for w in row) for row in rows]
    rows[:, 2] = (rows[:, 2] - 9) % 50 + 10
    contrast = [" ".join(f"w{w}" for w in row) for row in rows]
    return Pairs(clean, contrast, ["w30"] * n, ["w31"] * n)


def encoded(wiring: Wiring) -> EncodedPairs:
    return random_pairs().encode(wiring.model)


def everything(wiring: Wiring) -> list[int]:
    return list(range(len(wiring.graph.sources)))


# The split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biases", ["shared", "rest"])
@pytest.mark.parametrize("collapse", [False, True])
def test_both_parts_sum_to_the_activation(family: str, biases: str, *, collapse: bool) -> None:
    wiring = wiring_of(family)
    pairs = encoded(wiring)
    parts = Decomposition(wiring, pairs.clean, biases=biases, collapse=collapse)
    found = parts.follow(everything(wiring), wiring.writes(pairs.contrast).values)
    layers = len(wiring.graph.parallel)
    assert {f"{kind}{n}.stream" for kind in ("heads", "mlp") for n in range(layers)} < set(
        found.errors
    )
    assert max(found.errors.values()) < 5e-5, found.errors
    end = Site("resid_post", layers - 1, stack=wiring.model.main)
    truth = wiring.model.run(pairs.clean, record=[end])[end]
    size = truth.pow(2).mean().sqrt()
    assert float((found.beta + found.gamma - truth).abs().max() / size) < 5e-5
    assert float(found.beta.abs().amax((1, 2, 3)).min()) > 1e-3  # nobody's part is empty


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_nothing(family: str) -> None:
    wiring = wiring_of(family)
    parts = Decomposition(wiring, encoded(wiring).clean)
    found = parts.follow(everything(wiring), parts.writes.values)
    assert float(found.beta.abs().max()) == 0.0


def test_a_broken_rule_is_noticed() -> None:
    """Were the pattern another one, the parts would not sum, and the model would be refused."""
    wiring = wiring_of("llama")
    pairs = encoded(wiring)
    parts = Decomposition(wiring, pairs.clean)
    parts.patterns = {layer: pattern * 1.1 for layer, pattern in parts.patterns.items()}
    found = parts.follow([0], wiring.writes(pairs.contrast).values)
    assert found.errors["heads0.z"] > 0.1 and found.errors["logits.stream"] > 0.01
    with pytest.raises(NotOffered, match="layer 0 cannot be decomposed"):
        parts._prove()


class Plain:
    """The rules written out for GPT-2 and Llama, for one node and one prompt at a time."""

    def __init__(self, wiring: Wiring) -> None:
        self.model = wiring.model
        self.module: Any = wiring.model.module
        self.gpt = "GPT2" in type(self.module).__name__

    @staticmethod
    def share(beta: Tensor, gamma: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
        ratio = torch.nan_to_num(beta.abs() / (beta.abs() + gamma.abs()))
        return beta + ratio * bias, gamma + (1 - ratio) * bias

    def norm(self, norm: Any, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        whole = beta + gamma
        if self.gpt:
            scale = (whole.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            beta, gamma = (p - p.mean(-1, keepdim=True) for p in (beta, gamma))
            return self.share(beta / scale * norm.weight, gamma / scale * norm.weight, norm.bias)
        scale = (whole.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return beta / scale * norm.weight, gamma / scale * norm.weight

    def heads(self, layer: int, normed: tuple[Tensor, Tensor], pattern: Tensor) -> list[Tensor]:
        """What all heads write, once for each part, biases of the projection left out."""
        heads, width = pattern.shape[0], normed[0].shape[-1]
        if self.gpt:
            attn = self.module.transformer.h[layer].attn
            value, bias = attn.c_attn.weight[:, 2 * width :], attn.c_attn.bias[2 * width :]
            out, groups = attn.c_proj.weight, heads
        else:
            attn = self.module.model.layers[layer].self_attn
            value, bias, out = attn.v_proj.weight.T, 0.0, attn.o_proj.weight.T
            groups = self.module.config.num_key_value_heads
        both = self.share(normed[0] @ value, normed[1] @ value, bias)
        made = []
        for part in both:
            split = part.view(len(part), groups, -1)
            each = [pattern[h] @ split[:, h * groups // heads] for h in range(heads)]
            made.append(torch.cat(each, -1) @ out)
        return made

    def follow(self, layer: int, delta: Tensor, tokens: Any) -> Tensor:
        """The final beta of something that an MLP writes."""
        n = self.model.n_layers
        run = self.model.run(tokens, record=["resid_post", "pattern"])
        beta, gamma = delta, run["resid_post", layer][0] - delta
        for later in range(layer + 1, n):
            block = (self.module.transformer.h if self.gpt else self.module.model.layers)[later]
            first, second = (
                (block.ln_1, block.ln_2)
                if self.gpt
                else (block.input_layernorm, block.post_attention_layernorm)
            )
            made = self.heads(later, self.norm(first, beta, gamma), run["pattern", later][0])
            beta, gamma = beta + made[0], gamma + made[1]
            gamma = gamma + (block.attn.c_proj.bias if self.gpt else 0.0)
            one, other = self.norm(second, beta, gamma)
            beta, gamma = (
                beta + block.mlp(one + other) - block.mlp(other),
                gamma + block.mlp(other),
            )
        return beta


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_walk_equals_the_rules_written_out(family: str) -> None:
    wiring = wiring_of(family)
    pairs = encoded(wiring)
    reference = wiring.writes(pairs.contrast).values
    parts = Decomposition(wiring, pairs.clean)
    node = wiring.graph.sources.index("m0")
    found = parts.follow([node], reference).beta[0]
    number = next(i for i, w in enumerate(wiring.graph.writers) if w.kind == "mlp")
    delta = parts.writes.values[number] - reference[number]
    assert float(delta.abs().max()) > 0.01
    plain = Plain(wiring)
    with torch.no_grad():
        for row in range(len(pairs)):
            truth = plain.follow(0, delta[row], pairs.clean.rows([row]))
            torch.testing.assert_close(found[row], truth, atol=2e-4, rtol=1e-4)


def test_collapsed_parts_have_one_sign() -> None:
    wiring = wiring_of("gpt2")
    pairs = encoded(wiring)
    parts = Decomposition(wiring, pairs.clean, collapse=True)
    beta, gamma = torch.tensor([2.0, -3.0, 1.0]), torch.tensor([-1.0, 1.0, -4.0])
    shape = (1, 1, 1, 3)
    made = parts._collapsed((beta.view(shape), gamma.view(shape)))
    assert made[0].flatten().tolist() == [1.0, -2.0, 0.0]
    assert made[1].flatten().tolist() == [0.0, 0.0, -3.0]


def test_padding_changes_nothing() -> None:
    model = uh.load()
    wiring = Wiring(model)
    one = ["the capital of France is", "Mary and John went to the store , John gave a drink to"]
    two = ["the capital of Japan is", "Mary and John went to the store , Mary gave a drink to"]
    ids = torch.tensor([[5], [6]]), torch.tensor([[7], [8]])

    def shares(clean: Any, contrast: Any, rows: slice) -> Tensor:
        parts = Decomposition(wiring, clean)
        found = parts.follow(everything(wiring), wiring.writes(contrast).values)
        assert max(found.errors.values()) < 1e-4
        return parts.shares(found.beta, ids[0][rows], ids[1][rows])

    alone = [shares(model.tokens(one[i]), model.tokens(two[i]), slice(i, i + 1)) for i in range(2)]
    for side in ("left", "right"):
        clean, contrast = (model.tokens(texts, padding=side) for texts in (one, two))
        found = shares(clean, contrast, slice(None))
        torch.testing.assert_close(found, torch.cat(alone, 1), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["opt", "mamba", "falcon", "olmo", "bert", "deepseek_v3"])
def test_others_are_refused_in_one_sentence(family: str) -> None:
    model = random_model(family)
    with pytest.raises(NotOffered):
        contextual_decomposition(model, random_pairs())


# The method --------------------------------------------------------------------------------------


def brute(wiring: Wiring, pairs: EncodedPairs, node: int) -> float:
    """What the logit difference loses when all edges out of a node are cut."""
    keep = torch.ones(wiring.graph.real.shape)
    keep[node] = 0
    other = wiring.writes(pairs.contrast)
    ends = [wiring.logits(pairs.clean, other, k) for k in (torch.ones_like(keep), keep)]
    one, cut = (DIFF(end, pairs.answers, pairs.wrong).double().mean() for end in ends)
    return float(one - cut)


def test_in_a_linear_model_contributions_are_exact() -> None:
    organism = wired("linear")
    found = contextual_decomposition(organism.model, organism.pairs(n=8))
    wiring = Wiring(organism.model)
    pairs = organism.pairs(n=8).encode(organism.model)
    values = found["contribution"].values
    for node in everything(wiring):
        assert abs(values[node] - brute(wiring, pairs, node)) < 1e-3
    gap = float((found["clean"] - found["contrast"]).mean())
    assert abs(float(found["contribution"].sel(node="input")) - gap) < 1e-3 < gap
    assert np.nanmax(np.abs(found["exact"].values - values)) < 1e-3
    assert float(found["pearson_all"]) > 0.999


def said(result: Result) -> str:
    views: Any = result.view
    return " ".join(views.views[0].items)


def test_induction_is_found_through_values_and_what_patterns_hide_is_said() -> None:
    organism = wired("induction")
    found = contextual_decomposition(organism.model, organism.pairs(n=16), verify=11)
    values = found["contribution"]
    order = values["node"].values[np.argsort(-np.abs(values.values))]
    assert list(order[:2]) == ["a1.h1", "input"]
    gap = float((found["clean"] - found["contrast"]).mean())
    assert abs(float(values.sel(node="a1.h1")) - gap) < 0.01
    rest = values.drop_sel(node=["a1.h1", "input"]).values
    assert np.abs(rest).max() < 1e-3
    # The previous-token head works through keys alone: patterns are held, so it gets nothing.
    assert float(found["exact"].sel(node="a0.h2")) > 5
    assert "Nodes with another exact effect: 1 of" in said(found) and "a0.h2" in said(found)


def test_in_a_trained_model_it_agrees_with_exact_patching() -> None:
    pairs = Pairs(
        ["the capital of France is", "the capital of Norway is"],
        ["the capital of Japan is", "the capital of Italy is"],
        ["Paris", "Oslo"],
        ["Tokyo", "Rome"],
    )
    found = contextual_decomposition(uh.load("village"), pairs, verify=21)
    assert float(found["pearson_all"]) > 0.99 > 0.7 > float(found["pearson_chance"])
    assert float(found["sum_error"]) < 1e-4
    each = contextual_decomposition(uh.load("village"), pairs, verify=21, batch_size=1)
    for name in ("change", "control", "exact"):
        np.testing.assert_allclose(each[name].values, found[name].values, atol=2e-3)


def test_a_mean_is_another_reference() -> None:
    organism = wired("linear")
    found = contextual_decomposition(organism.model, organism.pairs(n=8), reference="mean")
    # Linear: what is measured against the mean is what ablating to the mean takes away.
    np.testing.assert_allclose(found["contribution"].values, found["exact"].values, atol=1e-3)
    other = contextual_decomposition(organism.model, organism.pairs(n=8))
    assert np.abs(found["contribution"] - other["contribution"]).max() > 0.1


def test_the_control_is_a_direction_of_equal_norm() -> None:
    organism = wired("induction")
    found = contextual_decomposition(organism.model, organism.pairs(n=8), draws=20)
    assert found["control"].shape == (20, 11)
    assert float(found["contribution"].sel(node="a1.h1")) > float(found["chance"]) > 0
    assert abs(float(found["control"].sel(node="a1.h1").mean())) < 5


def test_a_random_direction_starts_with_the_nodes_norm() -> None:
    wiring = wiring_of("llama")
    pairs = encoded(wiring)
    parts, reference = Decomposition(wiring, pairs.clean), wiring.writes(pairs.contrast).values
    last = len(wiring.graph.sources) - 1  # nothing comes after it
    own = parts.follow([last], reference).beta
    drawn = [parts.follow([last], reference, random=seed).beta for seed in (0, 0, 1)]
    torch.testing.assert_close(own[0], parts.delta(last, reference))
    torch.testing.assert_close(drawn[0].norm(dim=-1), own.norm(dim=-1))
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_what_cannot_be_asked() -> None:
    organism = wired("linear")
    with pytest.raises(OutOfRange, match="at least"):
        contextual_decomposition(organism.model, organism.pairs(n=2), draws=0)
    with pytest.raises(UsageError, match="biases"):
        Decomposition(Wiring(organism.model), organism.pairs(n=2).encode(organism.model).clean,
                      biases="none")  # fmt: skip
    bare = contextual_decomposition(organism.model, organism.pairs(n=1), verify=0)
    assert "exact" not in bare.data and np.isnan(bare["sem"].values).all()
