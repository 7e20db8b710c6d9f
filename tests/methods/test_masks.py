"""The method `masks`: weights, planted heads, planted bigrams, and circuits beside their rivals."""

import copy
from typing import Any

import pytest
import torch
from planted import pairs_of, planted
from random_models import random_model
from torch import Tensor

import underhood as uh
from underhood.circuits.masks import Recipe, train_masks
from underhood.core.errors import NotOffered, OutOfRange, UsageError
from underhood.core.model import Model
from underhood.data import EncodedPairs, Pairs, metric_named
from underhood.methods.locate._mask_heads import Carrying
from underhood.methods.locate._mask_weights import (
    Bigrams,
    Goal,
    Weights,
    bigrams_counted,
    bigrams_of,
    correlation,
)
from underhood.methods.locate.masks import masks
from underhood.organisms import organism
from underhood.organisms.wired_models import wired
from underhood.view import Result

LABELS = ["w10", "w11", "w12", "w13"]
LOGIT_DIFF = metric_named("logit_diff")


def word_pairs(n: int = 4) -> Pairs:
    """Prompts of different length, so that some are padded."""
    make = torch.Generator().manual_seed(1)
    rows = []
    for row in range(n):
        words = [f"w{i}" for i in torch.randint(20, 90, (5 + row % 2,), generator=make).tolist()]
        rows.append((" ".join(words), " ".join(["w9", *words[1:]]), "w14", "w15"))
    clean, contrast, right, wrong = (list(c) for c in zip(*rows, strict=True))
    return Pairs(clean, contrast, right, wrong)


# Weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_mask_of_ones_is_the_model_bit_for_bit(family):
    model = random_model(family)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    tokens = word_pairs().encode(model).clean
    weights = Weights(model)
    assert torch.equal(weights.logits(torch.ones(weights.total), tokens), model.run(tokens).logits)
    values = torch.rand(weights.total, requires_grad=True)
    weights.logits(values, tokens, grad=True).sum().backward()
    assert values.grad is not None and float(values.grad.abs().max()) > 0
    after = model.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_masked_model_is_the_model_with_weights_set_to_zero(family):
    model = random_model(family)
    weights, tokens = Weights(model), word_pairs().encode(model).clean
    kept = torch.rand(weights.total, generator=torch.Generator().manual_seed(0)) < 0.5
    other: Any = copy.deepcopy(model.module)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for matrix in weights.matrices:
            own = parameters[matrix.path]
            own.mul_(kept[matrix.span].view(own.shape))
    expected = Model(other, model.tokenizer).run(tokens).logits
    assert torch.allclose(weights.logits(kept.float(), tokens), expected, atol=1e-6)
    # Embeddings, norms and biases are none of the parts.
    masked = sum(p.numel() for n, p in other.named_parameters()
                 if p.ndim > 1 and "embed" not in n and "wte" not in n and "wpe" not in n
                 and "lm_head" not in n)  # fmt: skip
    assert weights.total == masked


def test_gradients_of_weight_masks_equal_finite_differences():
    model = random_model("gpt2")
    model.module.double()
    pairs = word_pairs().encode(model)
    goal = Goal(Weights(model), pairs, "metric", LOGIT_DIFF)
    make = torch.Generator().manual_seed(0)
    values = torch.rand(goal.weights.total, generator=make, dtype=torch.float64).requires_grad_()
    index = range(len(pairs))
    found = torch.autograd.grad(goal(values, index), values)[0]
    for cell in [int(found.abs().argmax()), 5, goal.weights.total // 2]:
        step = torch.zeros(len(values), dtype=torch.float64)
        step[cell] = 1e-5
        with torch.no_grad():
            ends = [float(goal(values + s * step, index)) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5
        assert float(found[cell]) == pytest.approx(slope, rel=1e-3, abs=1e-8)


def test_own_bigrams_are_what_the_model_says_after_one_token():
    town = uh.load()
    both = [town.tokens(["the capital of France is", "Mary gave"])]  # padded
    table = bigrams_of(town, both)
    for word in (" France", " Mary"):
        alone = town.run(torch.tensor([[1, town.token_id(word)]])).last_logits[0].softmax(-1)
        assert torch.allclose(table.after(torch.tensor(town.token_id(word))), alone, atol=1e-6)
    first = town.run(torch.tensor([[1]])).last_logits[0].softmax(-1)
    assert torch.allclose(table.after(torch.tensor(1)), first, atol=1e-6)


def test_counted_bigrams_back_off_to_what_is_common():
    model = random_model("gpt2")
    both = [model.tokens(["w10 w11 w12 w40"])]
    table = bigrams_counted(model, ["w10 w11 w10 w11 w10 w12", "w12 w11"], both)
    single = torch.ones(99)
    single[[11, 10, 12]] += torch.tensor([3.0, 2.0, 1.0])
    single /= single.sum()
    expected = single.clone()
    expected[11] += 2
    expected[12] += 1
    assert torch.allclose(table.after(torch.tensor(10)), expected / 4, atol=1e-6)
    assert torch.allclose(table.after(torch.tensor(40)), single, atol=1e-6)  # never seen


def bigram_model() -> tuple[Model, Bigrams, Tensor]:
    """Llama whose first MLP turns w10..w15 into w20..w25 by eighteen weights; the rest is noise."""
    model = random_model("llama")
    net: Any = model.module
    count, make = 6, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.08 * torch.randn(parameter.shape, generator=make))
            elif "norm" in name:
                parameter.fill_(1.0)
        embed, out, mlp = net.model.embed_tokens.weight, net.lm_head.weight, net.model.layers[0].mlp
        for i in range(count):
            embed[10 + i] = 0.0
            embed[10 + i, i] = 4.0
            out[20 + i, count + i] = 1.2
            mlp.gate_proj.weight[i, i] = mlp.up_proj.weight[i, i] = 1.0
            mlp.down_proj.weight[count + i, i] = 1.0
    weights = Weights(model)
    wires = torch.zeros(weights.total, dtype=torch.bool)
    for matrix in weights.matrices:
        if matrix.layer == 0 and matrix.name.startswith("mlp"):
            shape = dict(net.named_parameters())[matrix.path].shape
            mine = torch.zeros(shape, dtype=torch.bool)
            for i in range(count):
                mine[(count + i, i) if "down" in matrix.name else (i, i)] = True
            wires[matrix.span] = mine.flatten()
    vocab = out.shape[0]
    probs = torch.full((count, vocab), 0.1 / (vocab - 1))
    probs[range(count), range(20, 20 + count)] = 0.9
    rows = torch.full((vocab,), -1)
    rows[10 : 10 + count] = torch.arange(count)
    return model, Bigrams(rows, probs, "planted"), wires


def bigram_pairs(model: Model, n: int, seed: int) -> EncodedPairs:
    make = torch.Generator().manual_seed(seed)
    words = torch.randint(10, 16, (2, n, 5), generator=make)
    words[1, :, 0] = 10 + (words[0, :, 0] - 9) % 6  # never the same as the clean one
    clean, contrast = ([" ".join(f"w{i}" for i in row) for row in side] for side in words.tolist())
    return Pairs(clean, contrast, ["w30"] * n, ["w31"] * n).encode(model)


def test_the_wires_of_a_planted_bigram_are_found():
    model, table, wires = bigram_model()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    weights, pairs = Weights(model), bigram_pairs(model, 16, 0)
    goal = Goal(weights, pairs, "bigram", LOGIT_DIFF, table)
    found = train_masks(goal, weights.total, 16, Recipe(kind="sigmoid", lam=10.0, steps=60, lr=0.1))
    assert bool(found.kept[wires].all())
    assert int(wires.sum()) == 18 and int(found.kept.sum()) < 40 and weights.total > 20_000
    test = Goal(weights, bigram_pairs(model, 16, 1), "bigram", LOGIT_DIFF, table)
    mine, other = test.value(found.kept), test.value(weights.random(found.kept, seed=0))
    assert mine < test.value(wires) + 0.05 and other > mine + 2
    assert test.value(~found.kept) > mine + 2
    # As many weights of each matrix in the control, and the model is as it was.
    assert weights.shares(weights.random(found.kept, seed=0)) == weights.shares(found.kept)
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())


def test_surprisals_of_a_model_of_bigrams_correlate_with_bigrams():
    """Town itself, asked about prompts of two tokens, is its own bigram model."""
    town = uh.load()
    words = ["Mary", "John", "France", "Monday", "June", "seven"]
    pairs = Pairs(words, [*words[1:], words[0]], ["is"] * 6, ["and"] * 6).encode(town)
    table = bigrams_of(town, [pairs.clean, pairs.contrast])
    weights = Weights(town)
    assert correlation(weights, torch.ones(weights.total), pairs, table) == pytest.approx(1.0)
    assert correlation(weights, torch.zeros(weights.total), pairs, table) < 0.9


@pytest.mark.parametrize("loss", ["bigram", "kl"])
def test_weight_masks_by_name(loss):
    town, pairs = uh.load(), organism("town").pairs("capitals", 6)
    found = masks(town, pairs, level="weight", loss=loss, steps=12, draws=2, batch_size=4, lr=0.05)
    assert float(found["loss_mask"]) < float(found["loss_random"].min())
    assert float(found["loss_mask"]) < float(found["loss_removed"])
    kept = float(found["count"].sum()) / float(found["weights"])
    assert kept == pytest.approx(float(found["kept_share"])) and kept < 0.9
    assert ("r_mask" in found.data) == (loss == "bigram")
    if loss == "bigram":
        assert float(found["r_mask"]) > float(found["r_random"].max()) + 0.2
    else:
        assert float(found["loss_model"]) == pytest.approx(0, abs=1e-5)
    assert found["loss"].sizes["step"] == 12


# Heads -------------------------------------------------------------------------------------------


def chosen_heads(found: Result) -> list[tuple[int, int]]:
    layers, heads = found["in_circuit"].values.nonzero()
    return [(int(layer), int(head)) for layer, head in zip(layers, heads, strict=True)]


def test_whole_shares_are_exact_exchanges():
    model = random_model("llama")
    pairs = word_pairs()
    encoded = pairs.encode(model)
    work = Carrying(model, pairs, encoded, position="changed", metric=LOGIT_DIFF)
    objective = work.objective("metric")
    way = float((work.clean - work.contrast).mean())
    for heads in ([0], [3], [1, 2, 5], list(range(len(work.heads)))):
        share = torch.zeros(len(work.heads))
        share[heads] = 1.0
        with torch.no_grad():
            moved = objective(share, range(len(encoded)))
        # The loss is the logit difference itself: minus the one with answers exchanged.
        exact = (float(work.clean.mean()) - float(moved)) / way
        assert exact == pytest.approx(float(work.moved([heads])[0]), abs=1e-4)
    assert float(work.moved([[]])[0]) == 0.0


@pytest.mark.parametrize("position", ["last", "1"])
def test_gradients_of_head_shares_equal_finite_differences(position):
    model = random_model("gpt2")
    model.module.double()
    pairs = word_pairs()
    work = Carrying(model, pairs, pairs.encode(model), position=position, metric=LOGIT_DIFF)
    objective, index = work.objective("answer"), [0, 1, 3]
    make = torch.Generator().manual_seed(0)
    values = torch.rand(3, len(work.heads), generator=make, dtype=torch.float64).requires_grad_()
    found = torch.autograd.grad(objective(values, index), values)[0]
    for cell in [(0, 0), (1, 3), (2, len(work.heads) - 1)]:
        step = torch.zeros(values.shape, dtype=torch.float64)
        step[cell] = 1e-5
        with torch.no_grad():
            ends = [float(objective(values + s * step, index)) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5
        assert float(found[cell]) == pytest.approx(slope, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "loss", "metric"),
    [(None, None, "logit_diff"), (None, "metric", "logit"), ("hard-concrete", "kl", "logit_diff")],
)
def test_a_planted_head_is_found(kind, loss, metric):
    labels = {w: {0: value} for w, value in zip(LABELS, (2.0, -2.0, 1.0, -1.0), strict=True)}
    model = planted([(1, 2, 0)], labels)
    pairs = pairs_of(LABELS[:2], 8)
    found = masks(model, pairs, level="head", kind=kind, loss=loss, metric=metric, steps=60,
                  draws=5)  # fmt: skip
    assert chosen_heads(found) == [(1, 2)]
    assert float(found["moved"]) == pytest.approx(1.0, abs=1e-3)
    assert float(found["moved_random"].mean()) < 0.5
    assert float(found["single"][1, 2]) == pytest.approx(1.0, abs=1e-3)


def test_two_heads_that_are_needed_together_are_found_together():
    """Each of two heads carries one of two labels' coordinates; both must go."""
    labels = {"w10": {0: 2.0, 1: 2.0}, "w11": {0: -2.0, 1: -2.0}}
    model = planted([(0, 1, 0), (1, 3, 1)], labels)
    found = masks(model, pairs_of(["w10", "w11"], 8), level="head", steps=60, draws=5, lam=0.02)
    assert chosen_heads(found) == [(0, 1), (1, 3)]
    assert float(found["moved"]) > float(found["single"].max()) + 0.2


# Circuits ----------------------------------------------------------------------------------------


def test_edge_masks_beside_edge_attribution_and_chance():
    made = wired("induction")
    found = masks(made.model, made.pairs(n=16), steps=45, batch_size=4, draws=4)
    chosen = found["name"].values[found["in_circuit"].values]
    assert set(chosen.tolist()) == made.truth.edges["resample"]
    assert float(found["f"]) == pytest.approx(1.0, abs=1e-3)
    assert float(found["f_random"].max()) < 0.5 and float(found["kl_random"]) > 0.1
    assert float(found["kl"]) == pytest.approx(0, abs=1e-4)
    assert int(found["size"]) == len(chosen) <= int(found["size_eap_ig"])
    assert found.provenance["kind"] == "hard-concrete" and found.provenance["held_out"] == 0.5
    assert found["share"].dims == ("step",) and float(found["share"][-1]) < 0.2


def test_node_masks_count_nodes():
    made = wired("induction")
    found = masks(made.model, made.pairs(n=8), level="node", steps=40, batch_size=4, draws=3)
    chosen = {str(n) for n in found["node"].values[found["in_circuit"].values]}
    nodes = {edge.split("->")[0] for edge in made.truth.edges["resample"]} - {"input"}
    assert chosen == nodes
    assert int(found["size"]) == len(nodes) and float(found["f"]) > 0.99
    assert float(found["f_eap_ig"]) <= 1.001


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error"),
    [({"loss": "bigram"}, UsageError), ({"level": "head", "init": "eap-ig"}, UsageError),
     ({"level": "weight", "ablation": "mean"}, UsageError), ({"corpus": ("a b",)}, UsageError),
     ({"level": "weight", "loss": "kl", "corpus": ("a b",)}, UsageError),
     ({"held_out": 1.0}, OutOfRange), ({"draws": 0}, OutOfRange), ({"steps": 0}, OutOfRange),
     ({"level": "head", "position": "all"}, UsageError), ({"lam": 1e4, "steps": 40}, UsageError),
     ({"metric": "rank", "loss": "metric"}, UsageError)],
)  # fmt: skip
def test_what_would_be_ignored_or_empty_is_refused(given, error):
    made = wired("shift_by")
    with pytest.raises(error):
        masks(made.model, made.pairs(n=4), **given)


def test_models_without_edges_are_sent_away():
    with pytest.raises(NotOffered):
        masks(random_model("bert"), word_pairs(1), steps=2)
