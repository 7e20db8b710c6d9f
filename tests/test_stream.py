"""`stream`: what its layers and states carry, by hooks and emptied weights of the plain module."""

import copy
from random import Random
from typing import Any

import pytest
import torch

from underhood.core.model import Model
from underhood.organisms import Language, organism
from underhood.organisms.establish import Trial
from underhood.organisms.stream import LAYERS, N, deciding, forget

TASKS = ("capitals", "successors", "agreement", "mood")


@pytest.fixture(scope="module")
def stream() -> Language:
    found = organism("stream")
    assert isinstance(found, Language)
    return found


@pytest.fixture(scope="module")
def model(stream: Language) -> Model:
    return stream.load()


def test_shipped_weights_know_the_tasks(stream: Language, model: Model) -> None:
    assert tuple(stream.tasks) == tuple(stream.card.tasks) == TASKS
    for task, numbers in stream.measure(model, 60, 7).items():
        assert stream.card.tasks[task]["accuracy"] >= 0.95
        assert numbers["accuracy"] >= 0.9
    assert model.check().ok
    assert sum(path.stat().st_size for path in stream.folder.iterdir()) < 1_000_000


def test_its_words_are_those_of_the_shipped_tokenizer(stream: Language, model: Model) -> None:
    """Should `town` change what these tasks say, `stream` must be built again."""
    vocabulary = model.tokenizer.get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == list(stream.words)
    for task in TASKS:
        for case in stream.cases(task, 100, 8, "train"):
            assert {*case.words, *case.contrast, *case.accept, case.answer} <= set(stream.words)


def accuracy(trial: Trial, module: Any) -> float:
    with torch.no_grad():
        logits = module(input_ids=trial.tokens.ids).logits
    last = logits[torch.arange(N), trial.tokens.mask.sum(1) - 1].argmax(1)
    return float((last[:, None] == trial.answers).any(1).float().mean())


@pytest.mark.parametrize("task", TASKS)
def test_a_mixer_at_its_mean_costs_what_the_card_says(
    stream: Language, model: Model, task: str
) -> None:
    fact = stream.truth[f"mixer of {task}"]
    trial = Trial(stream, model, task, N)
    module: Any = copy.deepcopy(model.module)
    mixer = module.backbone.layers[int(fact.parts[0][1:])].mixer
    kept = trial.tokens.mask.clone()
    kept[:, 0] = False
    written: list[torch.Tensor] = []
    watch = mixer.register_forward_hook(lambda _, given, out: written.append(out))
    whole = accuracy(trial, module)
    watch.remove()
    mean = written[0][kept].mean(0)
    mixer.register_forward_hook(lambda _, given, out: mean.expand_as(out))
    assert fact.effect is not None and fact.control is not None
    assert whole - accuracy(trial, module) == pytest.approx(fact.effect, abs=0.011)
    assert fact.effect > fact.control


@pytest.mark.parametrize("task", TASKS)
def test_a_state_without_input_costs_what_the_card_says(
    stream: Language, model: Model, task: str
) -> None:
    """B is what a convolution leaves of its channels: emptied weights make it silu(0) = 0."""
    fact = stream.truth[f"state of {task}"]
    trial = Trial(stream, model, task, N)
    module: Any = copy.deepcopy(model.module)
    mixer = module.backbone.layers[int(fact.parts[0][-1])].mixer
    inner, states = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    mixer.conv1d.weight.data[inner : inner + states] = 0
    mixer.conv1d.bias.data[inner : inner + states] = 0
    whole = accuracy(trial, model.module)
    assert whole - accuracy(trial, module) == pytest.approx(fact.effect, abs=0.011)


def test_the_states_hold_the_deciding_word(stream: Language, model: Model) -> None:
    """Forgetting a country costs its capital; nothing is written where it was, and before it all
    states are what they were."""
    fact = stream.truth["memory of capitals"]
    assert fact.effect is not None and fact.control is not None
    assert fact.effect > fact.control + 0.2
    trial = Trial(stream, model, "capitals", N)
    told = deciding(stream, "capitals")
    assert trial.before.accuracy - trial.score(forget(told)).accuracy == pytest.approx(
        fact.effect, abs=0.011
    )
    rows = range(8)
    some, first = trial.tokens.rows(rows), [at[0] for at in told[:8]]
    clean = model.run(some, record=["ssm_state.0", "ssm_dt.0"])
    without = model.run(some, record=["ssm_state.0"], edits=forget(told[:8]))
    mixer: Any = model.module.get_submodule("backbone.layers.0.mixer")
    decay = (clean["ssm_dt.0"] * -mixer.A_log.exp()).exp()  # [batch pos head]
    for row, at in zip(rows, first, strict=True):
        before, now = without["ssm_state.0"][row, at - 1], without["ssm_state.0"][row, at]
        assert torch.equal(before, clean["ssm_state.0"][row, at - 1])
        faded = decay[row, at].repeat_interleave(len(before) // len(decay[row, at]))
        torch.testing.assert_close(now, faded[:, None] * before, atol=1e-5, rtol=1e-4)


def test_every_task_has_its_facts(stream: Language) -> None:
    names = [fact.name for fact in stream.truth.facts]
    assert names == [f"{what} of {task}" for task in TASKS for what in ("mixer", "state", "memory")]
    for fact in stream.truth.facts:
        assert (
            fact.task in TASKS and len(fact.parts) in (1, LAYERS) and fact.unit == "accuracy lost"
        )


def test_training_draws_the_same_again(stream: Language) -> None:
    torch.manual_seed(0)
    module = stream.fresh()
    first, again = (list(stream.losses(module, Random("0:3"), 3, 1200)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    sum(first).backward()  # type: ignore[union-attr]
    assert all(weight.grad is not None for weight in module.parameters())
