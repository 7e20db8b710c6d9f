"""Prior layers: a bias for common answers is planted in a known layer, found and taken out."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from scipy.stats import spearmanr
from torch import Tensor, nn

import underhood as uh
from underhood.core.edit import Edit
from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.ops import project_out, zero
from underhood.methods.locate._prior_edits import direction, effects_of, outputs
from underhood.methods.locate._prior_items import items_of, readings_of, spearman
from underhood.methods.locate.prior_layers import prior_layers, tune_layers
from underhood.methods.read._unembedding import head_of
from underhood.organisms.town_counting import CYCLES

NUMBERS = CYCLES[2][1][:18]


def counting() -> tuple[list[str], list[str]]:
    """`three four five` -> `six`: prompts and right answers."""
    spans = [(at, n) for at in range(15) for n in (2, 4) if at + n < len(NUMBERS)]
    return [" ".join(NUMBERS[at : at + n]) for at, n in spans], [NUMBERS[at + n] for at, n in spans]


def priors() -> dict[str, float]:
    """A log frequency for every answer, evenly spread, in an order of its own."""
    answers = sorted(set(counting()[1]))
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(0)).tolist()
    return dict(zip(answers, (0.3 * place for place in order), strict=True))


def corpus() -> tuple[str, ...]:
    return tuple(" ".join([word] * round(np.exp(log))) for word, log in priors().items())


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load("village")


def planted(town: Model, layer: int, strength: float = 10.0) -> Model:
    """The town with a constant in one MLP's output that lifts answers as their priors stand."""
    module: Any = copy.deepcopy(town.module)
    words = priors()
    log = torch.tensor(list(words.values()))
    rows = module.lm_head.weight.detach()[[town.token_id(word) for word in words]]
    wanted = (log - log.mean()) / log.std()
    constant = torch.linalg.pinv(rows * module.model.norm.weight.detach()) @ wanted
    old = module.model.layers[layer].mlp.down_proj
    new = nn.Linear(old.in_features, old.out_features, bias=True)
    new.weight, new.bias = old.weight, nn.Parameter(strength * constant)
    module.model.layers[layer].mlp.down_proj = new
    return Model(module, town.tokenizer, name=f"town with a prior in layer {layer}")


@pytest.mark.parametrize("layer", [3, 1])
def test_a_planted_prior_is_found_and_removed(town: Model, layer: int) -> None:
    prompts, answers = counting()
    found = prior_layers(
        planted(town, layer), prompts, answers=tuple(answers), corpus=corpus(), draws=3
    )
    # The planted layer adds most to the slope over log priors, far more than permuted priors give.
    carried, chance = found["carried"].values[1:], found["carried_control"].values[1:]
    assert carried.argmax() == layer and carried[layer] > 1.5 * chance[layer]
    assert np.delete(carried, layer).max() < 0.3 * carried[layer]
    # Its MLP is the component that works against the answer, and no random change is like it.
    effect = found["effect"].values[:, 1:]
    assert np.unravel_index(effect.argmin(), effect.shape) == (1, layer)
    assert (
        effect.min() < -3
        and effect.min() < 2 * -np.abs(found["effect_control"].values[1, 1:]).max()
    )
    assert found["edited"].values.sum() == 1 and found["edited"].values[1, layer + 1]
    # Items are known before it and lost in it (a lens of early layers is rough: not all of them).
    lost = found["overwritten"].values
    assert lost.mean() > 0.15
    assert (found["loss_layer"].values[lost] == layer).mean() > 0.6
    # The paper's kind of statistic, one wrong token per item, is weaker: with 29 items it hardly
    # leaves what permuted priors give.
    linked, within = found["correlation_all"].values, found["correlation_control"].values
    assert layer == 1 or linked[-1] > 0.9 * within[-1]
    # Without that component's prior the rare answers come back; without random ones' they do not.

    def right(name: str) -> float:
        rows = found["rows"].values
        return float(np.nansum(found[name].values * rows) / rows.sum())

    assert right("accuracy_edited") > right("accuracy") + 0.2
    assert right("accuracy_random") < right("accuracy") + 0.1
    rare = found.data.isel(part=0)
    assert rare["accuracy_edited"] > rare["accuracy"] + 0.3
    assert abs(float(found["error_prior_edited"])) < abs(float(found["error_prior"])) - 0.2
    assert float(found["error_prior"]) < -0.4
    assert not found["train"].values.all() and found["train"].values.any()


def test_without_a_prior_nothing_is_found(town: Model) -> None:
    prompts, answers = counting()
    found = prior_layers(town, prompts, answers=tuple(answers), corpus=corpus(), draws=1)
    assert found["correct"].values.all() and not found["overwritten"].values.any()
    assert (found["carried"].values[1:] < found["carried_control"].values[1:]).all()
    assert np.isnan(found["correlation"].values).all()  # no item is wrong
    assert found["effect"].values[:, 1:].min() > -1
    assert (found["accuracy_edited"].values[found["rows"].values > 0] == 1).all()


def test_tuning_those_layers_frees_answers_that_it_never_saw(town: Model) -> None:
    prompts, answers = counting()
    model = planted(town, 3)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    found = prior_layers(
        model, prompts, answers=tuple(answers), corpus=corpus(), tune=80, draws=1,
        instruction="Every number is after the day. ",
    )  # fmt: skip
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert found["tuned"].values.tolist() == [False, False, False, False, True]
    rows = found["rows"].values
    gain = found["accuracy_tuned"].values - found["accuracy"].values
    assert np.nansum(gain * rows) / rows.sum() > 0.1 and gain[0] > 0.2
    assert 0 < found["tuned_size"].values[-1] < 0.5
    assert {"accuracy_instructed", "accuracy_tuned_random"} <= set(found.data)
    assert found.provenance["losses"][-1] < 0.2 * found.provenance["losses"][0]


def test_the_delta_is_low_rank_and_is_the_whole_difference(town: Model) -> None:
    prompts, answers = counting()
    tuned = tune_layers(planted(town, 3), prompts, answers, [3], rank=2, steps=6)
    model = planted(town, 3)
    after = tuned.model(model).module.state_dict()
    delta = tuned.delta()
    assert delta and all(name.startswith("model.layers.3.") for name in delta)
    for name, tensor in model.module.state_dict().items():
        if name in delta:
            assert torch.allclose(after[name], tensor + delta[name], atol=1e-6)
            assert torch.linalg.matrix_rank(delta[name]) <= 2 and delta[name].abs().max() > 0
        else:
            assert torch.equal(after[name], tensor), name
    assert tuned.losses[-1] < tuned.losses[0]
    again = tune_layers(planted(town, 3), prompts, answers, [3], rank=2, steps=6)
    assert again.losses == tuned.losses
    with pytest.raises(OutOfRange, match="no layer 4"):
        tune_layers(town, prompts, answers, [4])


def test_a_prior_from_stems_or_from_the_other_prompts(town: Model) -> None:
    """The planted constant acts after any stem, so stems show it."""
    prompts, answers = counting()
    model = planted(town, 3)
    ids = [town.token_id(word) for word in priors()]
    log = torch.tensor(list(priors().values()))
    stems = ("The number after", "The day and", "Mary said")
    by_stems = items_of(model, prompts, answers, stems=stems)
    assert float(spearman(by_stems.prior[0, ids], log)) > 0.8
    assert (
        abs(float(spearman(items_of(town, prompts, answers, stems=stems).prior[0, ids], log))) < 0.6
    )
    sure = model.run(prompts).last_logits.softmax(-1).double()
    others = items_of(model, prompts, answers)
    expected = sure[torch.arange(len(sure)) != 4].mean(0).log()
    assert torch.allclose(others.prior[4].double(), expected, atol=1e-3)
    counts = items_of(town, prompts, answers, corpus=("two two three", "two")).prior[0]
    two, three, four = (float(counts[town.token_id(w)]) for w in ("two", "three", "four"))
    assert np.allclose([two - four, three - four], np.log([4, 2]), atol=1e-5)


# Against what is computed by hand ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_effects_equal_runs_with_one_edit(family: str) -> None:
    model = random_model(family)
    prompts = [f"w{i} w31 w40" for i in range(20, 26)]
    answers = [f"w{i}" for i in range(50, 56)]
    head = head_of(model)
    items = items_of(model, prompts, answers)
    seen = readings_of(model, head, items, outputs(model), batch_size=None)
    rows = torch.arange(6)
    wrong = items.candidates[items.favoured]

    def margin(logits: Tensor) -> Tensor:
        return logits[rows, items.answers] - logits[rows, wrong]

    start = margin(model.run(prompts).last_logits)
    along = direction(head, items)
    options: dict[str, Any] = {"draws": 1, "seed": 0, "batch_size": None}
    for kind in ("zero", "direction", "mean"):
        found = effects_of(model, head, items, seen, kind=kind, **options)
        for number, site in enumerate(found.sites):
            mean = model.run(prompts, record=site)[site][items.train, -1].mean(0)
            op = {"zero": zero(), "direction": project_out(along), "mean": uh.mean(mean)}[kind]
            edited = margin(model.run(prompts, edits=Edit(site, op, -1)).last_logits)
            assert torch.allclose(found.effect[number].float(), start - edited, atol=1e-4)
        assert found.effect.abs().max() > 0.05


def test_the_statistics_are_what_they_say(town: Model) -> None:
    prompts, answers = counting()
    model = planted(town, 3)
    found = prior_layers(model, prompts, answers=tuple(answers), corpus=corpus(), draws=1)
    items = items_of(model, prompts, answers, corpus=corpus())
    run = model.run(prompts, record="resid_post", at=-1)
    said = run.last_logits.argmax(-1)
    wrong = said != items.answers
    prior = items.prior[0]
    slopes = np.zeros(2)
    for layer in (2, 3):
        lens = model.unembed(run["resid_post", layer][:, 0])
        log = lens.log_softmax(-1)[wrong, said[wrong]].numpy()
        rho: Any = spearmanr(log, prior[said[wrong]].numpy())[0]
        assert abs(float(found["correlation"].sel(layer=layer)) - rho) < 1e-4
        each = []
        for row, answer in enumerate(items.answers.tolist()):
            other = items.candidates[items.candidates != answer]
            favourite = other[prior[other].argmax()]
            margin = float(lens[row, answer] - lens[row, favourite])
            assert abs(float(found["margin"].sel(layer=layer)[row]) - margin) < 1e-3
            each.append(np.polyfit(prior[other].numpy(), lens[row, other].numpy(), 1)[0])
        slopes[layer - 2] = np.mean(each)
    assert abs(float(found["slope"].sel(layer=3)) - slopes[1]) < 1e-3
    assert abs(float(found["carried"].sel(layer=3)) - (slopes[1] - slopes[0])) < 1e-3


def test_refusals(town: Model) -> None:
    prompts, answers = counting()
    with pytest.raises(UsageError, match="right answer"):
        prior_layers(town, prompts)
    with pytest.raises(UsageError, match="many answers"):
        prior_layers(town, prompts[:3], answers=tuple(answers[:3]))
    with pytest.raises(UsageError, match="stems or from a corpus"):
        prior_layers(town, prompts, answers=tuple(answers), stems=("The",), corpus=("one",))
    with pytest.raises(OutOfRange, match="that many layers"):
        prior_layers(town, prompts, answers=tuple(answers), layers=5)
    with pytest.raises(OutOfRange, match="number of steps"):
        prior_layers(town, prompts, answers=tuple(answers), tune=-1)
