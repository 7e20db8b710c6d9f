"""Commitment on a model whose distractor was wired in, against hooks, and on the town."""

from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import underhood as uh
from underhood.core.errors import OutOfRange, PairError
from underhood.core.model import Model
from underhood.data import Pairs
from underhood.methods.locate._trace_graph import concepts
from underhood.methods.locate.commitment import commitment
from underhood.methods.read._unembedding import head_of
from underhood.organisms import organism

# Words: four subjects, four answers, the distractor, `lure`, `calm` and `ask`.
WORDS = [*(f"s{i}" for i in range(4)), *(f"a{i}" for i in range(4)), "wrong", "lure", "calm", "ask"]
V = len(WORDS)
TOKEN, POS, SAID, FIRST, SECOND, WIDTH = 0, V, V + 3, 2 * V + 3, 3 * V + 3, 4 * V + 3


def wired(fetch: int, associate: int) -> Model:
    """A GPT-2 of five blocks that answers `s1 calm ask` with a1, and is led astray by `lure`.

    Block 0 brings the subject to the last token and looks its answer up (1). Block `fetch` brings
    what stands in the middle; the MLP of block `associate` turns `lure` into `wrong` (3).
    """
    config = GPT2Config(
        vocab_size=V, n_positions=3, n_embd=WIDTH, n_layer=5, n_head=1, n_inner=8,
        activation_function="relu", tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net: Any = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.transformer.wte.weight[:, TOKEN : TOKEN + V] = torch.eye(V)
        net.transformer.wpe.weight[:, POS : POS + 3] = torch.eye(3)
        net.lm_head.weight[:, SAID : SAID + V] = 5 * torch.eye(V)
        net.transformer.ln_f = nn.Identity()
        blocks = net.transformer.h
        for block in blocks:
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
            block.attn.c_proj.weight[:] = torch.eye(WIDTH)
        _fetch(blocks[0], 0, FIRST)
        for subject in range(4):
            blocks[0].mlp.c_fc.weight[FIRST + subject, subject] = 1.0
            blocks[0].mlp.c_proj.weight[subject, SAID + 4 + subject] = 1.0
        _fetch(blocks[fetch], 1, SECOND)
        blocks[associate].mlp.c_fc.weight[SECOND + WORDS.index("lure"), 7] = 1.0
        blocks[associate].mlp.c_proj.weight[7, SAID + WORDS.index("wrong")] = 3.0
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="ask"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Model(net, PreTrainedTokenizerFast(tokenizer_object=core), name="wired")


def _fetch(block: Any, source: int, buffer: int) -> None:
    """The last token copies the token at `source`; the others copy their own."""
    weight = block.attn.c_attn.weight
    for pos in range(3):
        weight[POS + pos, POS + (source if pos == 2 else pos)] = 1e3
        weight[POS + pos, WIDTH + POS + pos] = 1.0
    weight[TOKEN : TOKEN + V, 2 * WIDTH + buffer : 2 * WIDTH + buffer + V] = torch.eye(V)


def led_astray() -> Pairs:
    return Pairs(
        [f"s{i} calm ask" for i in range(4)], [f"s{i} lure ask" for i in range(4)],
        [[f"a{i}"] for i in range(4)], [["wrong"]] * 4,
    )  # fmt: skip


@pytest.mark.parametrize(("fetch", "associate"), [(3, 3), (1, 3), (2, 4)])
def test_the_layer_that_was_wired_is_found(fetch: int, associate: int) -> None:
    model = wired(fetch, associate)
    said = [
        model.token_text(int(i)) for i in model.run(list(led_astray().clean)).last_logits.argmax(1)
    ]
    assert said == ["a0", "a1", "a2", "a3"]
    found = commitment(model, led_astray(), graph="none", top=1, draws=2)
    assert found["usable"].values.all()
    assert (found["commitment"].values == fetch).all()
    assert (found["association"].values == associate).all()
    # 5 for the answer, 15 for the wrong one, and nothing between.
    curve = np.full(6, 5.0)
    curve[fetch + 1 :] = -10
    assert np.allclose(found["inserted"].values, curve, atol=1e-4)
    curve[:] = 5
    curve[associate + 1 :] = -10
    assert np.allclose(found["frozen"].values, curve, atol=1e-4)
    assert np.allclose(found["lens_hallucinating"].values[:, 1:], curve[1:], atol=1e-4)
    assert (found["says_wrong"].values == (found["inserted"].values < 0)).all()
    # What attention brings in one layer and the MLP turns in another.
    for name, at in (("contextual", fetch), ("associative", associate)):
        effect = found[name].values[:, 1:]
        assert np.allclose(effect[:, at], 15, atol=1e-4), name
        assert np.abs(np.delete(effect, at, 1)).max() < 1e-4, name
        assert np.allclose(found[f"coherence_{name}"].values, 1)
    # Random changes of equal length do not commit before the wrong answer itself is written.
    late = found["commitment_control"].values
    assert (np.isnan(late) | (late >= associate)).all()
    # Another row's stream before `lure` is fetched brings another answer, and nothing wrong.
    assert np.allclose(found["shuffled"].values[:, 1 : fetch + 1], 0, atol=1e-4)


def test_a_planted_support_is_an_edge() -> None:
    """Block 2 says `ask` as soon as an answer is said: the answer supports `ask`."""
    model = wired(3, 3)
    net: Any = model.module
    with torch.no_grad():
        for answer in range(4):
            net.transformer.h[2].mlp.c_fc.weight[SAID + 4 + answer, answer] = 1.0
            net.transformer.h[2].mlp.c_proj.weight[answer, SAID + WORDS.index("ask")] = 0.8
    found = commitment(model, led_astray(), graph="all", top=2, graph_row=1).data
    chosen = found.isel(edge=(found["edge_run"].values == "factual"))
    names = ("edge_layer", "edge_to", "edge_source", "edge_target", "weight", "edge_control")
    kept = {
        (layer, to, source): (weight, control)
        for layer, to, source, target, weight, control in zip(
            *(chosen[name].values.tolist() for name in names), strict=True
        )
        if target == "ask"
    }
    # Ablating a1 takes e_a1 - 1/12 out of SAID, so that all twelve words stand at 1/12, and the
    # four new neurons then say 0.8 * 4/12 for `ask`; of the fall the mean over words is taken out.
    fell, mean = 0.8 - 0.8 * 4 / 12 - 1 / 12, (0.8 - 0.8 * 4 / 12) / 12
    for way in ((0, 2), (1, 2), (0, 4), (1, 4)):
        weight, control = kept[(*way, "a1")]
        assert abs(weight - 5 * (fell - mean)) < 1e-4 and control < weight / 2
    assert (0, 1, "a1") not in kept  # `ask` is no concept of layer 1


# Against hooks written by hand -------------------------------------------------------------------


def _last(model: Model, ids: Tensor, changes: dict[int, Tensor]) -> list[Tensor]:
    """The last token's stream after every block, with some of them replaced on the way."""
    net: Any = model.module
    blocks = net.transformer.h if hasattr(net, "transformer") else net.model.layers
    states: list[Tensor] = []

    def change(number: int) -> Any:
        def hook(_m: Any, _args: Any, out: Any) -> Any:
            h = (out[0] if isinstance(out, tuple) else out).clone()
            if number in changes:
                h[:, -1] = changes[number]
            states.append(h[:, -1])
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook

    hooks = [block.register_forward_hook(change(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        net(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return states


def _random_pairs(model: Model) -> Pairs:
    clean, contrast = ["w20 w31 w40 w9", "w21 w30 w41 w9"], ["w50 w31 w42 w9", "w51 w33 w41 w9"]
    first = [model.run(side).last_logits for side in (clean, contrast)]
    tops = [(first[0] - first[1]).argmax(1), (first[1] - first[0]).argmax(1)]
    ids = [[[int(i)] for i in top] for top in tops]
    return Pairs(clean, contrast, ids[0], ids[1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_equals_hooks_written_by_hand(family: str) -> None:
    model = random_model(family)
    pairs = _random_pairs(model)
    encoded, lens = pairs.encode(model), head_of(model)
    rows = torch.arange(2)
    right, wrong = encoded.answers[:, 0], encoded.wrong[:, 0]

    def margin(stream: Tensor) -> Tensor:
        logits = lens.logits(stream)
        return logits[rows, right] - logits[rows, wrong]

    sides = [_last(model, t.ids, {}) for t in (encoded.clean, encoded.contrast)]
    found = commitment(model, pairs, graph="all", top=3, graph_row=1, draws=1)
    for layer in range(model.n_layers):
        inserted = _last(model, encoded.clean.ids, {layer: sides[1][layer]})[-1]
        at = found.data.sel(layer=layer)
        assert np.allclose(at["inserted"], margin(inserted), atol=1e-3)
        # With later outputs frozen the stream is a sum.
        frozen = sides[1][layer] + sides[0][-1] - sides[0][layer]
        assert np.allclose(at["frozen"], margin(frozen), atol=1e-3)
        assert np.allclose(at["lens_factual"], margin(sides[0][layer]), atol=1e-3)
    # The last layer is the wrong run itself.
    last = found.data.isel(layer=-1)
    assert np.allclose(last["inserted"], last["lens_hallucinating"], atol=1e-4)
    edge = found.data.isel(edge=(found["edge_run"].values == "factual"))
    one = encoded.clean.row(1)
    made = concepts(model, lens, torch.stack(_last(model, one.ids, {})), 3)
    seen = 0
    for number in range(edge.sizes["edge"]):
        e = edge.isel(edge=number)
        layer, to = int(e["edge_layer"]), int(e["edge_to"])
        source, target = int(e["edge_source_id"]), int(e["edge_target_id"])
        rank = made.ids[layer, 0].tolist().index(source)
        before = lens.logits(made.states[to])[0]
        after = lens.logits(_last(model, one.ids, {layer: made.without[layer, rank]})[to])[0]
        fell = (before - before.mean())[target] - (after - after.mean())[target]
        assert abs(float(e["weight"]) - float(fell)) < 1e-3
        seen += layer + 1 < to
    assert seen and edge["weight"].values.max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_ablated_concept_cannot_be_read_any_more(family: str) -> None:
    model = random_model(family)
    head = head_of(model)
    states = model.run("w20 w31 w40 w9", record="resid_post")["resid_post"][:, :, -1]
    made = concepts(model, head, states, 4)
    bias = torch.zeros(states.shape[-1]) if head.norm is None else _bias(head)
    flat = head.module(bias).detach()
    for layer in range(len(states)):
        for rank in range(4):
            token = int(made.ids[layer, 0, rank])
            logits = head.logits(made.without[layer, rank])[0]
            left = (logits - logits.mean())[token] - (flat - flat.mean())[token]
            whole = head.logits(states[layer])[0]
            assert abs(float(left)) < 1e-3 < float((whole - whole.mean())[token])


def _bias(head: Any) -> Tensor:
    bias = getattr(head.norm, "bias", None)
    return bias if isinstance(bias, Tensor) else torch.zeros_like(head.norm.weight)


# The town ----------------------------------------------------------------------------------------


def town_pairs(task: str, n: int) -> Pairs:
    return organism("village").pairs(task, n, 0)


def test_the_town_commits_before_it_associates() -> None:
    found = commitment(uh.load("village"), town_pairs("indirect_object", 5), top=3)
    assert found["usable"].values.all()
    gathered, said = found["commitment"].values, found["association"].values
    # Who gives is known in the first blocks, who takes is said in the last ones.
    assert (gathered <= said).all() and (gathered < said).sum() >= 3 and said.min() >= 2
    assert (found["inserted_control"].values > found["inserted"].values)[:, 1:].mean() > 0.9
    assert (found["coherence_contextual"].values > 0.9).all()
    aligned = found["alignment"].mean("batch").sel(layer=2)
    assert float(aligned.sel(part="factual")) > 0 > float(aligned.sel(part="hallucinating"))
    assert "settled" in str(found.view.to_dict())


def test_the_batch_size_does_not_matter() -> None:
    model = random_model("llama")
    pairs = _random_pairs(model)
    whole = commitment(model, pairs, top=2, draws=1)
    part = commitment(model, pairs, top=2, draws=1, batch_size=1)
    for name in whole.data.data_vars:
        assert np.allclose(part[str(name)], whole[str(name)], atol=1e-3, equal_nan=True), name


def test_refusals() -> None:
    model = wired(3, 3)
    with pytest.raises(PairError, match="no row has a run"):
        commitment(model, Pairs("s0 lure ask", "s0 calm ask", "a0", "wrong"))
    with pytest.raises(OutOfRange, match="no row 4"):
        commitment(model, led_astray(), graph_row=4)
    with pytest.raises(PairError, match="says the same"):
        commitment(model, Pairs("s0 lure ask", "s1 lure ask"))
