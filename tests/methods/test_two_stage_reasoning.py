"""Two-stage reasoning on a model whose two hops were wired by hand, and against hooks."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from underhood.core.errors import OutOfRange, PairError, UsageError
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.methods.locate.two_stage_reasoning import two_stage_reasoning

ENTITIES, RELATIONS = 9, 4
VOCAB = ENTITIES + RELATIONS
# Parts of the wired stream: the token, its position, what was looked up, and two buffers.
TOKEN, POS, SAID = 0, VOCAB, VOCAB + 3
BUFFERS = (SAID + VOCAB, SAID + VOCAB + ENTITIES)
WIDTH = SAID + VOCAB + 2 * ENTITIES


def facts() -> list[list[int]]:
    """`facts[relation][entity]`: a permutation per relation."""
    rng = random.Random(3)
    return [rng.sample(range(ENTITIES), ENTITIES) for _ in range(RELATIONS)]


def wired(first: int, second: int, layers: int = 4) -> Model:
    """A GPT-2 that looks up hop 1 in block `first` at r1, hop 2 in block `second` at r2.

    Norms are the identity. Every position attends to the one before it; the block of a hop copies
    what stands there into a buffer (the entity's token for hop 1, what was looked up for hop 2),
    and its MLP has one neuron per fact, which is on where buffer and token are that fact's.
    """
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=3, n_embd=WIDTH, n_layer=layers, n_head=1,
        n_inner=ENTITIES * RELATIONS, activation_function="relu", tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    net: Any = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.transformer.wte.weight[:, TOKEN : TOKEN + VOCAB] = torch.eye(VOCAB)
        net.transformer.wpe.weight[:, POS : POS + 3] = torch.eye(3)
        net.lm_head.weight[:, SAID : SAID + VOCAB] = 12 * torch.eye(VOCAB)
        net.lm_head.weight[:, TOKEN : TOKEN + VOCAB] = 6 * torch.eye(VOCAB)
        net.transformer.ln_f = nn.Identity()
        for number, block in enumerate(net.transformer.h):
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
            if number in (first, second):
                _wire(block, TOKEN if number == first else SAID, BUFFERS[number == second])
    words = {f"e{i}": i for i in range(ENTITIES)}
    words |= {f"r{i}": ENTITIES + i for i in range(RELATIONS)}
    core = Tokenizer(models.WordLevel(words, unk_token="e0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Model(net, PreTrainedTokenizerFast(tokenizer_object=core), name="wired")


def _wire(block: Any, source: int, buffer: int) -> None:
    """One hop: fetch an entity from `source` of the position before, look the fact up."""
    query, key, value = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3))
    weight = block.attn.c_attn.weight
    for pos in range(3):  # a query of position p meets the key of p - 1
        weight[:, query][POS + pos, POS + max(pos - 1, 0)] = 1e3
        weight[:, key][POS + pos, POS + pos] = 1.0
    for entity in range(ENTITIES):
        weight[:, value][source + entity, buffer + entity] = 1.0
    block.attn.c_proj.weight[:] = torch.eye(WIDTH)
    for relation, table in enumerate(facts()):
        for entity, found in enumerate(table):
            neuron = relation * ENTITIES + entity
            block.mlp.c_fc.weight[buffer + entity, neuron] = 1.0
            block.mlp.c_fc.weight[TOKEN + ENTITIES + relation, neuron] = 1.0
            block.mlp.c_fc.bias[neuron] = -1.0
            block.mlp.c_proj.weight[neuron, SAID + found] = 1.0


def questions(n: int, seed: int = 0) -> tuple[Pairs, tuple[str, ...]]:
    """Questions with one part swapped, labelled by it, and their bridges."""
    rng, table = random.Random(seed), facts()
    rows: list[tuple[str, str, str, str, str]] = []
    while len(rows) < n:
        label = ("h", "r1", "r2")[len(rows) % 3]
        ask = [rng.randrange(ENTITIES), rng.randrange(RELATIONS), rng.randrange(RELATIONS)]
        other, at = list(ask), ("h", "r1", "r2").index(label)
        other[at] = rng.randrange(RELATIONS if at else ENTITIES)
        bridge, theirs = (table[a[1]][a[0]] for a in (ask, other))
        answer, wrong = table[ask[2]][bridge], table[other[2]][theirs]
        if answer != wrong and (bridge != theirs or label == "r2"):
            clean, contrast = ("e{} r{} r{}".format(*a) for a in (ask, other))
            rows.append((clean, contrast, f"e{answer}", label, f"e{bridge}"))
    asked, swapped, answers, labels, bridges = (list(c) for c in zip(*rows, strict=True))
    return Pairs(asked, swapped, answers, labels=labels), tuple(bridges)


@pytest.mark.parametrize(("first", "second"), [(0, 2), (1, 3)])
def test_each_hop_is_found_where_it_was_wired(first: int, second: int) -> None:
    model = wired(first, second)
    pairs, bridges = questions(15)
    said = model.run(list(pairs.clean)).last_logits.argmax(-1).tolist()
    assert [f"e{i}" for i in said] == [row[0] for row in pairs.answers]  # the wiring works
    found = two_stage_reasoning(model, pairs, bridges=bridges, control=False)
    hops = {part: found.data.sel(part=part) for part in ("h", "r1", "r2")}
    assert float(hops["h"]["hop1_layer"]) == first and float(hops["h"]["hop2_layer"]) == second
    # A contrast that swaps r1 itself cannot tell when r1's token got the bridge.
    assert np.isnan(hops["r1"]["hop1_layer"]) and float(hops["r1"]["hop2_layer"]) == second
    assert np.isnan(hops["r2"]["hop1_layer"]) and np.isnan(hops["r2"]["hop2_layer"])
    # Before it is looked up, the bridge is carried by h and r1; then by r1; then by the last token.
    expected = np.zeros((5, 3))
    expected[: first + 1, 0] = 1
    expected[first + 1 : second + 1, 1] = 1
    expected[second + 1 :, 2] = 1
    assert np.abs(hops["h"]["share"].values - expected).max() < 1e-3
    expected = np.zeros((5, 3))
    expected[:, 2] = 1
    assert np.abs(hops["r2"]["share"].values - expected).max() < 1e-3
    assert not hops["r2"]["bridge_effect"].values[: first + 2, :2].any()  # r2 is not in the bridge


def test_the_bridge_is_readable_where_it_was_written() -> None:
    model = wired(0, 2)
    pairs, bridges = questions(9)
    found = two_stage_reasoning(model, pairs, bridges=bridges, draws=1)
    assert found["mrr_bridge"].sel(pos=1).values[1:].min() == 1.0
    assert found["mrr_answer"].sel(pos=2).values[3:].min() == 1.0
    assert (found["mrr_own"].values[0] == 1).all() and found["mrr_own"].values[-1, 1:].max() == 0.5
    assert float(found["hop1_readable"]) == 0 and float(found["hop2_readable"]) == 2
    assert int(found["bridge_layer"]) == 0
    assert found["shuffled_bridge"].sel(pos=1).values.max() < 0.4
    assert found["shuffled_answer"].sel(pos=2).values.max() < 0.4
    # At the bridge's own token, read in block 0: h is needed before that block, r1's state after.
    lost = found["bridge_rank_effect"].sel(part="h")
    assert float(lost.sel(layer=-1, pos=0)) > 0.5 and float(lost.sel(layer=0, pos=1)) > 0.5
    assert abs(float(lost.sel(layer=0, pos=0))) < 1e-6
    assert found["bridge_effect"].sel(layer=slice(1, None)).isnull().all()
    # The model itself says the bridge at r1: without being told, the same.
    own = two_stage_reasoning(model, pairs, control=False)
    assert np.allclose(own["mrr_bridge"], found["mrr_bridge"])


def test_it_reports_no_hops_where_the_answer_is_looked_up_at_once() -> None:
    """A one-hop question: the entity's own token differs, and nothing stands between."""
    model = wired(0, 2)
    pairs = Pairs(["e1 r0", "e2 r1"], ["e3 r0", "e4 r1"])
    found = two_stage_reasoning(model, pairs, bridges=("e1", "e2"), hop_at=0)
    assert np.isnan(found["hop1_layer"].values[0]) and float(found["hop2_layer"][0]) == 0


# Against hooks written by hand -------------------------------------------------------------------


def _by_hand(model: Model, ids: tuple[Tensor, Tensor], layer: int, pos: int) -> list[Tensor]:
    """All hidden states of the clean run with one state of the contrast run written into it."""
    net: Any = model.module
    blocks = net.transformer.h if hasattr(net, "transformer") else net.model.layers
    norm = net.transformer.ln_f if hasattr(net, "transformer") else net.model.norm
    kept: list[Tensor] = []
    with torch.no_grad():
        hook = blocks[max(layer, 0)].register_forward_hook(
            lambda _m, args, out: kept.append(args[0] if layer < 0 else _first(out))
        )
        net(input_ids=ids[1])
        hook.remove()

        def write(h: Tensor) -> Tensor:
            h = h.clone()
            h[:, pos] = kept[0][:, pos]
            return h

        if layer < 0:
            hook = blocks[0].register_forward_pre_hook(lambda _m, args: (write(args[0]), *args[1:]))
        else:
            hook = blocks[layer].register_forward_hook(
                lambda _m, _args, out: (
                    (write(out[0]), *out[1:]) if isinstance(out, tuple) else write(out)
                )
            )
        states: list[Tensor] = []
        hooks = [
            b.register_forward_hook(lambda _m, _a, out: states.append(_first(out))) for b in blocks
        ]
        net(input_ids=ids[0])
        for one in (hook, *hooks):
            one.remove()
        return [net.lm_head(norm(state)).log_softmax(-1) for state in states]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_equals_hooks_written_by_hand(family: str) -> None:
    model = random_model(family)
    pairs = Pairs(
        ["w20 w31 w12 w40 w55", "w21 w31 w12 w41 w55"],
        ["w20 w33 w12 w40 w55", "w21 w37 w13 w41 w55"], ["w30", "w44"],
    )  # fmt: skip
    encoded = pairs.encode(model)
    ids, layer = (encoded.clean.ids, encoded.contrast.ids), 1
    # The answer that the contrast loses: whatever is likelier in the clean run.
    logits = [model.run(side).last_logits.log_softmax(-1) for side in ids]
    answers = (logits[0] - logits[1]).argmax(-1)
    pairs = pairs.with_answers([[int(i)] for i in answers])
    bridge = [50, 60]
    found = two_stage_reasoning(
        model, pairs, bridges=("w50", "w60"), hop_at=3, bridge_layer=layer, control=False
    )
    rows = torch.arange(2)
    clean = _by_hand(model, (ids[0], ids[0]), 0, 0)
    for at in range(-1, model.n_layers):
        for pos in range(5):
            lens = _by_hand(model, ids, at, pos)
            lost = (clean[-1] - lens[-1])[rows, -1, answers].mean()
            assert abs(float(found["answer_effect"].sel(layer=at, pos=pos)[0]) - lost) < 1e-4
            if at <= layer and pos <= 3:
                lost = (clean[layer] - lens[layer])[rows, 3, bridge].mean()
                assert abs(float(found["bridge_effect"].sel(layer=at, pos=pos)[0]) - lost) < 1e-4
    assert found["answer_effect"].values.max() > 0.1
    assert not found["answer_effect"].sel(pos=0).values.any()  # before the first difference


def test_the_batch_size_does_not_matter() -> None:
    model = random_model("llama")
    pairs = Pairs([f"w{i} w31 w40 w55" for i in range(20, 24)], ["w50 w31 w40 w55"] * 4)
    options: dict[str, Any] = {
        "bridges": tuple(f"w{i}" for i in range(30, 34)),
        "hop_at": 2,
        "draws": 1,
    }
    whole = two_stage_reasoning(model, pairs, **options)
    part = two_stage_reasoning(model, pairs, batch_size=3, **options)
    for name in ("share", "answer_control", "bridge_effect", "bridge_control", "mrr_bridge"):
        assert np.allclose(part[name], whole[name], atol=2e-4, equal_nan=True), name


def test_refusals() -> None:
    model = wired(0, 2)
    pairs, bridges = questions(6)
    with pytest.raises(UsageError, match="one bridge"):
        two_stage_reasoning(model, pairs, bridges=bridges[:4])
    with pytest.raises(OutOfRange, match="no position"):
        two_stage_reasoning(model, pairs, bridges=bridges, hop_at=3)
    with pytest.raises(OutOfRange, match="no layer"):
        two_stage_reasoning(model, pairs, bridges=bridges, bridge_layer=4)
    with pytest.raises(OutOfRange, match="share"):
        two_stage_reasoning(model, pairs, bridges=bridges, threshold=0.0)
    longer = Pairs(["w20 w30 w40", "w20 w30"], ["w21 w30 w40", "w21 w30"])
    with pytest.raises(PairError, match="one form"):
        two_stage_reasoning(random_model("gpt2"), longer, bridges=("w50",))
    # What the contrast gains it cannot lose.
    wrong = model.run(pairs.contrast[0]).last_logits.argmax().item()
    with pytest.raises(PairError, match="cost the answer nothing"):
        two_stage_reasoning(model, pairs[0].with_answers([int(wrong)]), bridges=bridges[:1])
