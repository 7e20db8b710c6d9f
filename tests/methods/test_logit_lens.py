"""The logit lens: equal to the model at the end, to a hand-made lens in between."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model

import underhood as uh
from underhood.core.errors import AnswerError, NotOffered, OutOfRange
from underhood.methods.read.logit_lens import logit_lens
from underhood.view import Result
from underhood.view.doc import Grid, Group, Lines

PROMPT = "w10 w20 w30 w40 w50"
FAMILIES = ("gpt2", "llama", "gemma2", "cohere", "granite", "olmo2", "mamba", "rwkv", "zamba2")


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_is_the_model(family):
    model = random_model(family)
    found = logit_lens(model, PROMPT, answer="w70", top=3)
    probs = model.run(PROMPT).logits[0].softmax(-1)
    np.testing.assert_allclose(found["target_prob"][-1], probs[:, 70], atol=1e-5)
    np.testing.assert_allclose(found["top_prob"][-1], probs.topk(3).values, atol=1e-5)
    np.testing.assert_allclose(found["kl"][-1], 0, atol=1e-5)
    assert (found["settles"] < model.n_layers).all()


def test_inner_layers_equal_a_lens_by_hand():
    model = random_model("gpt2")
    found = logit_lens(model, PROMPT, answer="w70", wrong="w80", top=2)
    core: Any = model.module
    with torch.no_grad():
        states = core(model.tokens(PROMPT).ids, output_hidden_states=True)
        log = core.lm_head(core.transformer.ln_f(states.hidden_states[1]))[0].log_softmax(-1)
    final, prob = states.logits[0].log_softmax(-1), log.exp()
    layer = found.data.sel(layer=0)
    np.testing.assert_allclose(layer["entropy"], -(prob * log).sum(-1), atol=1e-5)
    np.testing.assert_allclose(layer["kl"], (final.exp() * (final - log)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(layer["wrong_prob"], prob[:, 80], atol=1e-6)
    order = log.argsort(-1, descending=True)
    assert layer["top_id"].values.tolist() == order[:, :2].tolist()
    assert layer["target_rank"].values.tolist() == (order == 70).int().argmax(-1).tolist()
    assert str(layer["top_token"].values[0, 0]) == f"w{order[0, 0]}"


def test_settling_layer():
    model = random_model("llama")
    found = logit_lens(model, PROMPT)
    best = found["top_id"].values[..., 0]
    for pos, settled in enumerate(found["settles"].values):
        same = best[:, pos] == best[-1, pos]
        assert same[settled + 1 :].all()
        assert settled == -1 or not same[settled]


def test_without_an_answer_it_follows_the_models_own_top_token():
    model = random_model("gpt2")
    found = logit_lens(model, PROMPT)
    own = model.run(PROMPT).logits[0].argmax(-1).tolist()
    assert found["target"].values.tolist() == [f"w{i}" for i in own]
    assert (found["target_rank"][-1] == 0).all()


def test_positions_are_those_of_the_whole_lens():
    model = random_model("gpt2")
    part, whole = logit_lens(model, PROMPT, positions=(-1, 1)), logit_lens(model, PROMPT)
    assert part["pos"].values.tolist() == [1, 4]
    assert part["token"].values.tolist() == ["w20", "w50"]
    np.testing.assert_allclose(part["entropy"], whole["entropy"][:, [1, 4]], atol=1e-6)


def test_town_forms_its_answer_on_the_way():
    found = logit_lens(uh.load(), "The capital of France is", answer="Paris")
    curve = found["target_prob"].values[:, -1]
    assert curve[0] < 0.1 < 0.9 < curve[-1]
    assert found["settles"].values[-1] >= 0
    assert float(found["control_prob"].mean()) < 0.1
    assert float(found["control_last"].max()) < curve[-1]


def test_control_is_seeded_and_of_another_size_than_the_claim():
    model = uh.load()
    one, again, other = (
        logit_lens(model, "The capital of France is", seed=s)["control_prob"] for s in (0, 0, 1)
    )
    assert (one == again).all()
    assert (one != other).any()


def test_view_marks_where_each_position_settles_and_survives_saving(tmp_path):
    found = logit_lens(random_model("gpt2"), PROMPT, answer="w70", wrong="w80")
    assert isinstance(found.view, Group)
    cells, curves = found.view.views
    assert isinstance(cells, Grid) and isinstance(curves, Lines) and cells.cell_text is not None
    assert cells.marks == [(int(s) + 1, p) for p, s in enumerate(found["settles"].values)]
    assert cells.cell_text[-1] == found["top_token"].values[-1, :, 0].tolist()
    assert [line.name for line in curves.series] == ["'w70'", "'w80'", "random vectors"]
    assert cells.control is not None
    found.save(tmp_path / "lens")
    assert Result.load(tmp_path / "lens").data.equals(found.data)


@pytest.mark.parametrize("family", ["vit", "plain_mlp", "bert", "t5", "bart"])
def test_refuses_models_without_such_a_lens(family):
    with pytest.raises(NotOffered):
        logit_lens(random_model(family), PROMPT)


def test_refuses_a_model_that_does_more_after_its_last_block():
    model = random_model("gpt2")

    def louder(_module, _args, output):
        output.logits = output.logits * 1.5

    model.module.register_forward_hook(louder)
    with pytest.raises(NotOffered, match="not what the model says"):
        logit_lens(model, PROMPT)


def test_refuses_bad_requests():
    model = random_model("gpt2")
    requests: list[tuple[type[Exception], dict[str, Any]]] = [
        (AnswerError, {"answer": "two words"}),
        (OutOfRange, {"top": 0}),
        (OutOfRange, {"top": 1000}),
        (OutOfRange, {"positions": (5,)}),
        (OutOfRange, {"positions": ()}),
    ]
    for error, options in requests:
        with pytest.raises(error):
            logit_lens(model, PROMPT, **options)


def test_a_reader_finds_the_numbers_behind_every_cell():
    """The page's list of candidates and its other measures are those of the data."""
    found = logit_lens(random_model("gpt2"), PROMPT, top=3)
    assert isinstance(found.view, Group)
    cells = found.view.views[0]
    assert isinstance(cells, Grid) and cells.candidates is not None
    listed = [[[cells.candidates.tokens[i] for i in cell] for cell in row]
              for row in cells.candidates.ids]  # fmt: skip
    assert listed == found["top_token"].values.tolist()
    np.testing.assert_allclose(np.array(cells.candidates.values), found["top_prob"], rtol=1e-6)
    for measure, name in zip(cells.measures, ("target_rank", "entropy", "kl"), strict=True):
        np.testing.assert_allclose(np.array(measure.values), found[name], rtol=1e-6)


def test_a_very_long_prompt_shows_the_followed_probability_alone(monkeypatch):
    monkeypatch.setattr(import_module("underhood.methods.read.logit_lens"), "_WHOLE", 10)
    cells = logit_lens(random_model("gpt2"), PROMPT).view.views[0]  # pyright: ignore
    assert isinstance(cells, Grid)
    assert cells.candidates is None and cells.measures == []
