"""Trained masks: exact gradients, known optima, wired circuits, and town's heads."""

import math

import pytest
import torch
from torch import Tensor

import underhood as uh
from underhood.circuits import masks as module
from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.faithfulness import Judge
from underhood.circuits.mask_trainer import _Mask
from underhood.circuits.masks import (
    KINDS,
    Recipe,
    _Cutting,
    circuit_masks,
    odds_from_scores,
    train_masks,
)
from underhood.circuits.score import edge_scores
from underhood.circuits.wiring import Wiring
from underhood.core.errors import NotFinite, OutOfRange, ShapeMismatch, UsageError
from underhood.data import EncodedPairs, metric_named
from underhood.organisms import organism
from underhood.organisms.wired_models import wired


def town_pairs(task: str, n: int) -> EncodedPairs:
    return organism("village").pairs(task, n).encode(uh.load("village"))


# The gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["edge", "node"])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_through_the_mask_equal_finite_differences(level, per_row, pairs_of, metric):
    model = uh.load("random/gpt2")
    model.module.double()
    wiring, pairs = Wiring(model), pairs_of("gpt2", 2)
    objective = _Cutting(wiring, pairs, metric, level, "resample", None, 8)
    parts = wiring.graph.n_edges if level == "edge" else len(wiring.graph.sources) - 1
    make = torch.Generator().manual_seed(0)
    shape = (2, parts) if per_row else (parts,)
    values = torch.rand(shape, generator=make, dtype=torch.float64).requires_grad_()
    found = torch.autograd.grad(objective(values, [0, 1]), values)[0].flatten()
    some = [*range(0, found.numel(), max(1, found.numel() // 5)), int(found.abs().argmax())]
    for cell in some:
        step = torch.zeros(found.numel(), dtype=torch.float64)
        step[cell] = 1e-5
        with torch.no_grad():
            ends = [objective(values + s * step.view(shape), [0, 1]) for s in (1, -1)]
        slope = float(ends[0] - ends[1]) / 2e-5
        assert float(found[cell]) == pytest.approx(slope, rel=1e-4, abs=1e-9)
    assert float(found.abs().max()) > 1e-3


def test_the_gradient_at_the_whole_model_is_edge_attribution(wiring_of, pairs_of, metric):
    wiring, pairs = wiring_of("gpt2"), pairs_of("gpt2")
    objective = _Cutting(wiring, pairs, metric, "edge", "resample", None, 8)
    values = torch.ones(wiring.graph.n_edges, requires_grad=True)
    found = -torch.autograd.grad(objective(values, range(len(pairs))), values)[0]
    scores = edge_scores(wiring, pairs, metric, method="eap").values[wiring.graph.real]
    assert torch.allclose(found, scores, atol=1e-5 * float(scores.abs().max()))


def test_values_that_are_held_and_values_made_anew_are_the_same(
    wiring_of, pairs_of, metric, monkeypatch
):
    wiring, pairs = wiring_of("gpt2"), pairs_of("gpt2")
    values = torch.rand(wiring.graph.n_edges)
    held = _Cutting(wiring, pairs, metric, "edge", "mean", None, 2)
    monkeypatch.setattr(module, "BUDGET", 0)
    anew = _Cutting(wiring, pairs, metric, "edge", "mean", None, 2)
    assert held.held is not None and anew.held is None
    with torch.no_grad():
        assert float(held(values, [2, 0])) == pytest.approx(float(anew(values, [2, 0])), abs=1e-6)


# The kinds ---------------------------------------------------------------------------------------


def test_hard_concrete_is_priced_by_its_chance_to_be_open():
    odds = torch.linspace(-3, 3, 7)
    mask = _Mask(Recipe(), odds)
    with torch.no_grad():
        drawn = mask.draw(40_000, torch.Generator().manual_seed(0))
    assert torch.allclose((drawn > 0).float().mean(0), mask.price().detach(), atol=0.01)
    assert bool((drawn == 0).any()) and bool((drawn == 1).any())


def test_the_uniform_gradient_is_unbiased():
    """For a loss that is linear in each part, E over 0/1 draws has a gradient in closed form."""
    odds = torch.tensor([-1.0, 0.3, 1.5])
    mask = _Mask(Recipe(kind="uniform"), odds)

    def loss(z: Tensor) -> Tensor:
        return 2 * z[..., 0] * z[..., 1] - z[..., 1] * z[..., 2] + z[..., 0] * z[..., 1] * z[..., 2]

    drawn = mask.draw(400_000, torch.Generator().manual_seed(0))
    found = torch.autograd.grad(loss(drawn).mean(), mask.own)[0]
    share = torch.sigmoid(odds).requires_grad_()
    exact = torch.autograd.grad(loss(share), share)[0] * (share * (1 - share)).detach()
    assert torch.allclose(found, exact, atol=0.01)


WORTH = torch.tensor([1.0, 0.0, 0.6, 0.02, -0.5, 0.3])


def worth(values: Tensor, index) -> Tensor:
    """Parts are worth something each; the price of a part is lam / 6."""
    return (WORTH.sum() - values @ WORTH).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_worth_more_than_their_price_are_kept(kind):
    found = train_masks(worth, 6, 4, Recipe(kind=kind, lam=0.6, steps=150, batch=4), per_row=True)
    assert found.kept.tolist() == [True, False, True, False, False, True]
    assert found.loss == pytest.approx(float(WORTH.sum() - WORTH[found.kept].sum()), abs=1e-5)
    assert found.history["share"][-1] == pytest.approx(0.5, abs=0.05)
    assert all(0 <= v <= 1 for v in found.values.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparsity_is_reached_and_keeps_the_best(kind):
    recipe = Recipe(kind=kind, sparsity=1 / 2, steps=120, batch=4, settled=0.0)
    found = train_masks(worth, 6, 4, recipe, per_row=True)
    assert found.kept.tolist() == [True, False, True, False, False, True]
    asked = found.history["asked"]
    assert asked[-1] == pytest.approx(1 / 2) and asked == sorted(asked)
    assert 1 - found.history["share"][-1] == pytest.approx(1 / 2, abs=0.05)


def test_a_sparsity_gives_way_in_order_of_worth_and_its_size_is_exact():
    for cut, kept in ((0.0, {*range(6)}), (4 / 6, {0, 2}), (5 / 6, {0}), (1.0, set())):
        found = train_masks(worth, 6, 4, Recipe(sparsity=cut, steps=250, batch=4), per_row=True)
        assert set(found.kept.nonzero()[:, 0].tolist()) == kept


def test_training_stops_when_all_is_decided_and_not_before_the_ramp():
    ticks: list[tuple[int, int]] = []
    recipe = Recipe(kind="clamped", lam=0.6, steps=200, batch=4, ramp=0.5)
    found = train_masks(worth, 6, 4, recipe, progress=lambda *at: ticks.append(at))
    assert 100 <= found.steps < 110
    assert ticks[0] == (1, 200) and len(ticks) == found.steps


def test_seeds_repeat_and_the_best_restart_wins():
    def bumpy(values: Tensor, index) -> Tensor:
        return worth(values, index) + 0.5 * (values[..., 0] * values[..., 2]).mean()

    recipe = Recipe(lam=0.6, steps=12, batch=2, lr=0.6)
    one, two = (train_masks(bumpy, 6, 8, recipe) for _ in range(2))
    assert one.history == two.history
    ends = []
    for restarts in (1, 2, 3, 4):
        found = train_masks(bumpy, 6, 8, Recipe(lam=0.6, steps=12, batch=2, lr=0.6,
                                                restarts=restarts))  # fmt: skip
        ends.append(found.loss + 0.6 * float(found.kept.float().mean()))
    assert ends == sorted(ends, reverse=True) and found.restart < 4


def test_odds_start_where_the_scores_say():
    size = torch.tensor([0.0, 1.0, 2.0, 4.0, 1e9])
    odds = odds_from_scores(size, 0.5)
    assert float(odds[2]) == pytest.approx(0.0) and float(odds[3]) == pytest.approx(math.log(2))
    assert float(odds.min()) == -3 and float(odds.max()) == 3
    with pytest.raises(OutOfRange):
        odds_from_scores(size, 1.0)


@pytest.mark.parametrize(
    ("given", "error"),
    [({"kind": "soft"}, UsageError), ({"steps": 0}, OutOfRange), ({"lam": -1.0}, OutOfRange),
     ({"sparsity": 2.5}, OutOfRange), ({"lr": 0.0}, OutOfRange), ({"start": 1.5}, OutOfRange)],
)  # fmt: skip
def test_recipes_refuse_what_cannot_be_trained(given, error):
    with pytest.raises(error):
        Recipe(**given)


def test_losses_that_are_no_numbers_and_odds_that_do_not_fit_are_refused():
    with pytest.raises(NotFinite, match="step 0"):
        train_masks(lambda z, i: z.sum() / 0 * 0, 3, 1, Recipe())
    with pytest.raises(ShapeMismatch):
        train_masks(worth, 6, 1, Recipe(), odds=torch.zeros(5))


# Circuits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "loss"),
    [("induction", "hard-concrete", "kl"), ("xor", "uniform", "kl"), ("gqa", "sigmoid", "answer"),
     ("shift_by", "clamped", "kl")],
)  # fmt: skip
def test_wired_edges_are_recovered_exactly(name, kind, loss, metric):
    made = wired(name)
    pairs, wiring = made.pairs(n=16).encode(made.model), Wiring(made.model)
    recipe = Recipe(kind=kind, steps=40, batch=4)
    found = circuit_masks(wiring, pairs, metric, recipe, loss=loss)
    assert set(found.circuit.edges) == made.truth.edges["resample"]
    # The scores rank the true edges first.
    best = found.scores.top(len(made.truth.edges["resample"]), prune=False)
    assert set(best.edges) == made.truth.edges["resample"]


def test_a_sparsity_recovers_them_too_and_can_start_from_scores(metric):
    made = wired("induction")
    pairs, wiring = made.pairs(n=16).encode(made.model), Wiring(made.model)
    truth = made.truth.edges["resample"]
    recipe = Recipe(sparsity=1 - len(truth) / wiring.graph.n_edges, steps=45, batch=4)
    scores = edge_scores(wiring, pairs, metric, steps=3)
    found = circuit_masks(wiring, pairs, metric, recipe, init=scores)
    assert set(found.circuit.edges) == truth


def test_a_warm_start_reaches_the_same_loss_in_fewer_steps(metric):
    made = wired("xor")
    pairs, wiring = made.pairs(n=16).encode(made.model), Wiring(made.model)
    scores = edge_scores(wiring, pairs, metric, steps=3)
    # The control: the same scores, dealt out among the edges anew.
    real = wiring.graph.real
    mine = scores.values[real]
    dealt = torch.zeros(real.shape)
    dealt[real] = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(0))]
    first = []
    for init in (None, scores, Scores(wiring.graph, dealt)):
        recipe = Recipe(steps=26, batch=4)
        history = circuit_masks(wiring, pairs, metric, recipe, init=init).trained.history
        priced = [a + b for a, b in zip(history["loss"], history["share"], strict=True)]
        first.append(next(i for i, value in enumerate([*priced, 0.0]) if value < 0.3))
    cold, warm, wrong = first
    assert warm < 0.6 * cold and warm < 0.6 * wrong


def test_node_masks_find_the_nodes_whose_removal_matters(metric):
    pairs, wiring = town_pairs("agreement", 8), Wiring(uh.load("village"))
    graph = wiring.graph
    found = circuit_masks(wiring, pairs, metric, Recipe(lam=3.0, steps=40, batch=4), level="node")
    cut = []
    for node in range(1, len(graph.sources)):
        mask = graph.real.clone()
        mask[node] = False
        cut.append(Circuit(graph, mask))
    judge = Judge(wiring, pairs, metric)
    effect, kept = 1 - judge.faithfulness(cut), found.trained.kept
    assert bool(kept[effect > 0.12].all()) and int((effect > 0.12).sum()) >= 4
    assert not bool(kept[effect.abs() < 0.005].any()) and int((effect.abs() < 0.005).sum()) >= 4
    assert float(judge.faithfulness([found.circuit])[0]) > 0.9
    # All edges of a node share its fate, and the input's are always kept.
    rows = found.scores.values
    for row, real in zip(rows, graph.real, strict=True):
        assert len(set(row[real].tolist())) <= 1


def test_a_mask_can_be_trained_towards_given_distributions(wiring_of, pairs_of, metric):
    """Towards what the contrast says, cutting everything is best."""
    wiring, pairs = wiring_of("gpt2"), pairs_of("gpt2")
    targets = wiring.writes(pairs.contrast).logits.softmax(-1)
    recipe = Recipe(kind="clamped", lam=0.0, steps=20, lr=0.3, batch=3)
    toward = circuit_masks(wiring, pairs, metric, recipe, targets=targets).trained
    entropy = float(-(targets * targets.log()).sum(-1).mean())
    assert toward.history["loss"][0] - entropy > 20 * (toward.history["loss"][-1] - entropy)


def test_nothing_is_cut_when_nothing_is_paid_and_the_model_is_left_as_it_was(
    wiring_of, pairs_of, metric
):
    wiring, pairs = wiring_of("llama"), pairs_of("llama")
    before = {k: v.clone() for k, v in wiring.model.module.state_dict().items()}
    flags = [p.requires_grad for p in wiring.model.module.parameters()]
    recipe = Recipe(kind="clamped", lam=0.0, steps=5, batch=2)
    found = circuit_masks(wiring, pairs, metric, recipe)
    assert len(found.circuit) == wiring.graph.n_edges
    assert found.trained.loss == pytest.approx(0, abs=1e-5)
    after = wiring.model.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert flags == [p.requires_grad for p in wiring.model.module.parameters()]
    assert all(p.grad is None for p in wiring.model.module.parameters())


def test_unknown_levels_and_metrics_without_gradients_are_refused(wiring_of, pairs_of, metric):
    wiring, pairs = wiring_of("gpt2"), pairs_of("gpt2")
    with pytest.raises(UsageError, match="no such mask"):
        circuit_masks(wiring, pairs, metric, level="neuron")
    with pytest.raises(UsageError, match="no such mask"):
        circuit_masks(wiring, pairs, metric, loss="hinge")
    with pytest.raises(UsageError, match="no gradient"):
        circuit_masks(wiring, pairs, metric_named("rank"), loss="metric")
