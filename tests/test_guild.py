"""`guild`: its experts serve trades, by plain hooks on its routers and by emptied weights."""

import copy
from random import Random
from typing import Any

import pytest
import torch

from underhood.core.model import Model
from underhood.organisms import Language, organism
from underhood.organisms.guild import CRAFTS, LAYERS, TRADES, facts, forbid, shares, specialise


@pytest.fixture(scope="module")
def guild() -> Language:
    found = organism("guild")
    assert isinstance(found, Language)
    return found


@pytest.fixture(scope="module")
def model(guild: Language) -> Model:
    return guild.load()


def test_shipped_weights_know_the_trades(guild: Language, model: Model) -> None:
    for trade, numbers in guild.measure(model, 60, 7).items():
        assert numbers["accuracy"] >= 0.95
        assert guild.card.tasks[trade]["accuracy"] >= 0.95
        assert guild.card.tasks[trade]["n"] == 500
    assert model.check().ok
    assert sum(path.stat().st_size for path in guild.folder.iterdir()) < 1_000_000


def test_shared_words_mean_something_else_in_every_trade() -> None:
    own = [word for craft in CRAFTS.values() for fact in craft for word in fact]
    assert len(own) == len(set(own))
    for kind in ("slang", "week"):
        known = [dict(facts(kind, trade)) for trade in TRADES]
        for word in known[0]:
            assert len({each[word] for each in known}) > 1
        assert all(set(each.values()) == set(known[0].values()) for each in known)


@pytest.mark.parametrize("trade", TRADES)
def test_pairs_differ_in_what_decides(guild: Language, model: Model, trade: str) -> None:
    pairs = guild.pairs(trade, 40, 5)
    encoded = pairs.encode(model)
    for clean, contrast in zip(encoded.clean.ids, encoded.contrast.ids, strict=True):
        assert int((clean != contrast).sum()) == 1
    for side, ids in ((encoded.clean, encoded.answers), (encoded.contrast, encoded.wrong)):
        right = model.run(side).last_logits.argmax(1) == ids[:, 0]
        assert float(right.float().mean()) >= 0.95
    assert {prompt.label for prompt in guild.prompts(trade, 5)} == {trade}
    tests = {case.words for case in guild.cases(trade, 200, 2)}
    rng = Random(0)
    for _ in range(300):
        words = guild.row(trade, rng).words[1:]
        assert not any(words[:n] in tests for n in range(1, len(words)))


def routed(model: Model, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Per layer each expert's share of the routing weight, from what enters the routers."""
    module: Any = model.module
    entered: list[torch.Tensor] = []
    routers = [layer.mlp.gate for layer in module.model.layers]
    hooks = [r.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
             for r in routers]  # fmt: skip
    with torch.no_grad():
        module(input_ids=ids)
    for hook in hooks:
        hook.remove()
    out = []
    for router, hidden in zip(routers, entered, strict=True):
        weights = (hidden @ router.weight.T).softmax(-1)
        least = weights.topk(2, -1).values[..., -1:]
        kept = torch.where(weights >= least, weights, 0)[mask.flatten()]
        out.append((kept.sum(0) / kept.sum()).detach())
    return out


@pytest.mark.parametrize("trade", TRADES)
def test_routing_is_that_of_the_card(guild: Language, model: Model, trade: str) -> None:
    fact = guild.truth[f"routing of {trade}"]
    sums = {}
    for name in TRADES:
        tokens = model.tokens([prompt.text for prompt in guild.prompts(name, 40, 9)])
        told = (tokens.ids == guild.words.index(name)).cumsum(1) > 0
        layers = routed(model, tokens.ids, told & tokens.mask)
        named = [part.removeprefix("m").split(".e") for part in fact.parts]
        sums[name] = sum(float(layers[int(at)][int(i)]) for at, i in named) / LAYERS
    assert fact.effect is not None and fact.control is not None
    assert fact.effect > 0.9 and sums[trade] == pytest.approx(fact.effect, abs=0.03)
    rest = [share for name, share in sums.items() if name != trade]
    assert fact.control < 0.1 and sum(rest) / len(rest) == pytest.approx(fact.control, abs=0.03)


def test_every_expert_serves_at_most_one_trade(guild: Language) -> None:
    parts = [part for trade in TRADES for part in guild.truth[f"routing of {trade}"].parts]
    assert len(parts) == len(set(parts))


def emptied(model: Model, parts: tuple[str, ...]) -> Any:
    """A copy of the module in which these experts write nothing."""
    module: Any = copy.deepcopy(model.module)
    for part in parts:
        layer, expert = part.removeprefix("m").split(".e")
        module.model.layers[int(layer)].mlp.experts.down_proj.data[int(expert)] = 0
    return module


def accuracy(guild: Language, model: Model, module: Any, trade: str) -> float:
    prompts = guild.prompts(trade, 100, 2)
    tokens = model.tokens([prompt.text for prompt in prompts])
    with torch.no_grad():
        logits = module(input_ids=tokens.ids).logits
    last = logits[torch.arange(len(tokens)), tokens.mask.sum(1) - 1].argmax(1)
    return sum(guild.words[i] == p.answer for i, p in zip(last, prompts, strict=True)) / 100


@pytest.mark.parametrize("trade", TRADES)
def test_emptied_experts_cost_their_trade_what_the_card_says(
    guild: Language, model: Model, trade: str
) -> None:
    fact = guild.truth[f"experts of {trade}"]
    assert fact.effect is not None and fact.control is not None
    assert fact.effect > 0.3 and fact.control < 0.05
    without = emptied(model, fact.parts)
    whole = accuracy(guild, model, model.module, trade)
    assert whole - accuracy(guild, model, without, trade) == pytest.approx(fact.effect, abs=0.011)
    others = [name for name in TRADES if name != trade]
    assert min(accuracy(guild, model, without, name) for name in others) >= 0.9


def test_forbidden_experts_are_not_chosen(guild: Language, model: Model) -> None:
    parts = guild.truth["experts of smiths"].parts
    tokens = model.tokens([prompt.text for prompt in guild.prompts("smiths", 20)])
    run = model.run(tokens, edits=forbid(parts), record=["router_index"])
    for layer in range(LAYERS):
        chosen = {f"m{layer}.e{int(i)}" for i in run["router_index", layer][tokens.mask].flatten()}
        assert not chosen & set(parts)
    assert shares(guild, model, "smiths").keys() >= set(parts)


def test_the_extra_loss_rewards_routers_that_tell_the_trade(guild: Language) -> None:
    """Two experts for each trade reach its least value; routers that tell nothing do not."""
    rows = [guild.row(trade, Random(trade)) for trade in TRADES for _ in range(3)]
    width = max(len(row.words) for row in rows)

    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.router_logits = (logits.flatten(0, 1),) * LAYERS

    blind = torch.zeros(len(rows), width, 8)
    told = blind.clone()
    for at, row in enumerate(rows):
        expert = 2 * TRADES.index(row.label)
        told[at, :, expert : expert + 2] = 50.0
    log = torch.tensor([2.0, 8.0]).log()
    least = 0.1 * float(log[0] - 2 * log[1])
    assert float(specialise(Output(told), rows)) == pytest.approx(least, abs=1e-4)
    assert float(specialise(Output(blind), rows)) == pytest.approx(-0.1 * float(log[1]), abs=1e-4)


def test_training_draws_the_same_again(guild: Language) -> None:
    """One step's loss is a function of the seed, and every weight has a gradient from it."""
    torch.manual_seed(0)
    module = guild.fresh()
    first, again = (list(guild.losses(module, Random("0:3"), 3, 500)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    first[0].backward()
    routers = [layer.mlp.gate.weight for layer in module.model.layers]  # type: ignore[union-attr]
    assert all(float(router.grad.abs().sum()) > 0 for router in routers)
