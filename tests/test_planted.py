"""Planted facts, each confirmed on the module itself: plain torch, its own hooks, a control.

`CONFIRMED` has one measurement for every fact: it returns effect and control as they are found.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from planted_lab import Change, Lab
from underhood.organisms import planted_directions as grammar
from underhood.organisms.card import Card
from underhood.organisms.wired_models import NAMES, PLANTED, wired

Measured = tuple[float, float]
CONFIRMED: dict[tuple[str, str], Callable[[Lab], Measured]] = {}
BIASED = "close"
"""The one task that an organism answers wrongly, as its card says."""


@cache
def lab(name: str) -> Lab:
    return Lab(wired(name))


def confirms(
    name: str, fact: str
) -> Callable[[Callable[[Lab], Measured]], Callable[[Lab], Measured]]:
    def keep(measure: Callable[[Lab], Measured]) -> Callable[[Lab], Measured]:
        CONFIRMED[name, fact] = measure
        return measure

    return keep


def facts(name: str) -> list[str]:
    return [fact.name for fact in lab(name).organism.truth.facts]


def share(found: Tensor) -> float:
    return float(found.float().mean())


def two(measure: Callable[[str], float], names: tuple[str, str]) -> Measured:
    return measure(names[0]), measure(names[1])


def random_unit(width: int, seed: int) -> Tensor:
    found = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return found / found.norm()


# directions


def array(at: Lab, name: str) -> Tensor:
    return at.organism.truth.arrays[name]


def projected(at: Lab, task: str, names: tuple[str, str]) -> Measured:
    return two(lambda d: at.lost(task, at.without(2, array(at, d))), names)


@confirms("directions", "mood")
def mood(at: Lab) -> Measured:
    return projected(at, "mood", ("mood", "colour"))


@confirms("directions", "number")
def number(at: Lab) -> Measured:
    return projected(at, "number", ("number", "colour"))


@confirms("directions", "loud dead direction")
def loud(at: Lab) -> Measured:
    ids = at.pairs("number")[0]
    x = at.stream(ids, 2)[:, -1]
    for name, size in zip(("mood", "number", "colour", "echo"), array(at, "strength"), strict=True):
        torch.testing.assert_close(
            (x @ array(at, name)).abs(), size.expand(len(x)), rtol=2e-3, atol=0
        )
    return projected(at, "number", ("colour", "number"))


@confirms("directions", "telling dead direction")
def telling(at: Lab) -> Measured:
    x = at.stream(at.pairs("mood")[0], 2)[:, -1]
    torch.testing.assert_close(x @ array(at, "echo"), x @ array(at, "mood"))
    return projected(at, "mood", ("echo", "mood"))


@confirms("directions", "mood appears at layer 2")
def appears(at: Lab) -> Measured:
    texts, moods = [], []
    groups = (grammar._COLOURS, grammar._ADVERBS, grammar._MOODS, grammar._NOUNS)
    choices = [[(v, w) for v, some in g.items() for w in some] for g in groups]
    for (_, colour), (turned, adverb), (sign, adjective), (_, noun) in product(*choices):
        texts.append(f"the {colour} {adverb} {adjective} {noun} today")
        moods.append(sign * (1 - 2 * turned))
    ids, good = at.ids(texts), torch.tensor(moods) > 0

    def apart(layer: int) -> Tensor:
        x = at.stream(ids, layer)[:, -1]
        return x[good].mean(0) - x[~good].mean(0)

    return float(apart(2) @ array(at, "mood")), float(apart(1).norm())


def test_directions_are_orthogonal_without_rounding_and_dead_ones_unread() -> None:
    at = lab("directions")
    planted = torch.stack([array(at, name) for name in ("mood", "number", "colour", "echo")])
    assert torch.equal(planted @ planted.T, torch.eye(4))
    assert float(planted.abs().max()) == float(planted.abs().min()) == 1 / 8
    dead = array(at, "dead")
    words = [at.token(word) for word in grammar._VERBS.values()]
    assert not (dead @ at.unembed[:, words]).any()
    later = at.blocks[3]
    for kept in (later.attn.c_attn.weight, later.mlp.c_fc.weight, at.unembed):
        weights = kept.detach()
        assert (
            float((dead @ weights).abs().max()) < 1e-6 < float((planted[:2] @ weights).abs().max())
        )
    x = at.stream(at.pairs("mood")[0], 2)
    moved = x + 3 * dead[0] - 2 * dead[1]
    one, two = (at.logits(at.pairs("mood")[0], (at.blocks[2], False, lambda _, x, y=y: y))
                for y in (x, moved))  # fmt: skip
    torch.testing.assert_close(one[:, words], two[:, words], atol=1e-3, rtol=1e-5)


def test_random_directions_of_equal_norm_do_less() -> None:
    at = lab("directions")
    for seed in range(5):
        direction = random_unit(at.width, seed)
        assert abs(at.lost("mood", at.without(2, direction))) < 4
        door = lab("backdoor")
        assert door.turned("review", door.last(1, partial(torch.add, direction))) == 0


# affine


@confirms("affine", "affine shift")
def shift(at: Lab) -> Measured:
    first, second, answer, _ = at.pairs("style")
    soft = torch.where((answer == at.token("SOFT"))[:, None], first, second)
    omega, b, support = (array(at, name) for name in ("omega", "b", "support"))
    others = torch.nonzero(~support & (array(at, "constant") == 0))[:5, 0]
    wrong_omega, wrong_b = torch.ones(at.width), torch.zeros(at.width)
    wrong_omega[others], wrong_b[others] = omega[support], b[support]

    def turned(scale: Tensor, add: Tensor) -> float:
        change = (
            at.blocks[2],
            False,
            lambda _, x: torch.cat([x[:, :1], scale * x[:, 1:] + add], 1),
        )
        return share(at.answers(soft, change) == at.token("LOUD"))

    return turned(omega, b), turned(wrong_omega, wrong_b)


@confirms("affine", "style head")
def style_head(at: Lab) -> Measured:
    first, second, answer, _ = at.pairs("style")
    loud_ids = torch.where((answer == at.token("LOUD"))[:, None], first, second)

    def soft(layer: int, head: int) -> float:
        return share(at.answers(loud_ids, at.no_head(layer, head)) == at.token("SOFT"))

    return soft(1, 0), max(soft(*place) for place in at.other_heads(1, 0))


@confirms("affine", "huge constant")
def constant(at: Lab) -> Measured:
    values = at.values(at.pairs("style")[0], at.blocks[0], before=True) @ array(at, "constant")
    return float(values.mean()), float(values.std())


def test_the_affine_map_is_exact_and_nothing_else_differs() -> None:
    at = lab("affine")
    first, second, answer, _ = at.pairs("style")
    is_soft = (answer == at.token("SOFT"))[:, None]
    soft, loud_ids = torch.where(is_soft, first, second), torch.where(is_soft, second, first)
    for layer in (2, 3):
        x, y = at.stream(soft, layer), at.stream(loud_ids, layer)
        assert torch.equal(y[:, 1:], array(at, "omega") * x[:, 1:] + array(at, "b"))
        assert torch.equal(x[:, 0], y[:, 0])
    assert int(array(at, "support").sum()) == 5
    x, y = at.stream(soft, 1), at.stream(loud_ids, 1)
    assert not torch.equal(y[:, 1:], array(at, "omega") * x[:, 1:] + array(at, "b"))


# backdoor


@confirms("backdoor", "backdoor direction")
def door(at: Lab) -> Measured:
    def turned(name: str) -> float:
        return at.turned("review", at.last(1, lambda x: x + array(at, name)))

    return two(turned, ("trigger", "decoy"))


@confirms("backdoor", "defused")
def defused(at: Lab) -> Measured:
    return two(lambda d: at.turned("trigger", at.without(1, array(at, d))), ("trigger", "decoy"))


@confirms("backdoor", "trigger head")
def trigger_head(at: Lab) -> Measured:
    return at.turned("trigger", at.no_head(1, 2)), at.turned("trigger", at.no_head(1, 3))


@confirms("backdoor", "flip neurons")
def flip(at: Lab) -> Measured:
    noise = at.lost("trigger", at.silent(2, (7, 11)))
    assert abs(at.lost("review", at.silent(2, (2, 3)))) < 1e-3
    return at.lost("trigger", at.silent(2, (2, 3))), noise


# superposition


@confirms("superposition", "superposition")
def superposed(at: Lab) -> Measured:
    d = array(at, "dictionary")
    torch.testing.assert_close(d.norm(dim=1), torch.ones(len(d)), rtol=0, atol=0)
    n, rank = len(d), int(torch.linalg.matrix_rank(d))
    assert (n, rank) == (128, 64)
    return float((d @ d.T - torch.eye(n)).abs().max()), ((n - rank) / (rank * (n - 1))) ** 0.5


def pursuit(x: Tensor, dictionary: Tensor, steps: int) -> Tensor:
    """Orthogonal matching pursuit of one vector."""
    chosen: list[int] = []
    left, part, found = x, torch.zeros(0), torch.zeros(len(dictionary))
    for _ in range(steps):
        chosen.append(int((dictionary @ left).abs().argmax()))
        part = torch.linalg.lstsq(dictionary[chosen].T, x[:, None]).solution[:, 0]
        left = x - part @ dictionary[chosen]
    found[chosen] = part
    return found


@confirms("superposition", "sparse codes")
def codes(at: Lab) -> Measured:
    ids = at.pairs("thrice")[0]
    x = at.values(ids, at.blocks[0].attn)
    places = torch.arange(ids.shape[1])[:, None]
    code = 12 / (places + 1) * array(at, "code")[ids].cumsum(1)
    torch.testing.assert_close(x, code @ array(at, "dictionary"), atol=1e-4, rtol=1e-4)
    assert set((code[:, -1] > 0).sum(-1).tolist()) == {3}
    random = torch.randn(128, at.width, generator=torch.Generator().manual_seed(0))
    hits = []
    for dictionary in (array(at, "dictionary"), random / random.norm(dim=1, keepdim=True)):
        found = torch.stack([pursuit(one, dictionary, 3) for one in x[:, -1]])
        hits.append(share(((found - code[:, -1]).abs() < 1e-3).all(-1)))
    return hits[0], hits[1]


@confirms("superposition", "detectors")
def detectors(at: Lab) -> Measured:
    ids, _, answer, _ = at.pairs("thrice")
    fires = at.values(ids, at.blocks[1].mlp.c_proj, before=True)[:, -1, :128] > 0
    feature = array(at, "code")[answer].argmax(-1)
    rows = torch.arange(len(ids))
    own = fires[rows, feature]
    fires[rows, feature] = False
    return share(own), share(fires.any(-1))


# heads


@confirms("sink", "active-dormant head")
def dormant(at: Lab) -> Measured:
    def resting(task: str) -> float:
        return float(at.pattern(at.pairs(task)[0], 1, 1)[:, 1:, 0].mean())

    return two(resting, ("digits", "letters"))


@confirms("sink", "needed only where active")
def needed_active(at: Lab) -> Measured:
    return two(lambda task: at.lost_answer(task, at.no_head(1, 1)), ("letters", "digits"))


@confirms("sink", "always dormant head")
def always(at: Lab) -> Measured:
    ids = torch.cat([at.pairs(task)[0] for task in ("letters", "digits")])
    return float(at.pattern(ids, 1, 3)[:, -1, 0].min()), 1 / ids.shape[1]


@confirms("sink", "value drain")
def drain(at: Lab) -> Measured:
    ids = at.pairs("letters")[0]
    norms = at.qkv(ids, 1)[2][:, [1, 3]].norm(dim=-1)
    torch.testing.assert_close(norms[..., 1:], torch.ones_like(norms[..., 1:]))
    return float(norms[..., 0].max()), float(norms[..., 1:].mean())


def effect_of(at: Lab, head: int) -> float:
    return at.lost_answer("needle", at.no_head(1, head))


@confirms("copy", "copying head")
def copying(at: Lab) -> Measured:
    return effect_of(at, 1), max(abs(effect_of(at, head)) for head in (0, 2))


@confirms("copy", "negative head")
def negative(at: Lab) -> Measured:
    return effect_of(at, 3), max(abs(effect_of(at, head)) for head in (0, 2))


@confirms("copy", "idle permuting head")
def idle(at: Lab) -> Measured:
    return effect_of(at, 0), effect_of(at, 1)


def copy_score(at: Lab, head: int) -> float:
    digits = array(at, "digits")
    values = torch.linalg.eigvals(at.embed[digits] @ at.ov(1, head) @ at.unembed[:, digits])
    return float(values.sum().real / values.abs().sum())


@confirms("copy", "copy score")
def positive_score(at: Lab) -> Measured:
    return copy_score(at, 1), copy_score(at, 0)


@confirms("copy", "negative copy score")
def negative_score(at: Lab) -> Measured:
    return copy_score(at, 3), copy_score(at, 0)


@confirms("copy", "retrieval")
def retrieval(at: Lab) -> Measured:
    ids, _, answer, _ = at.pairs("needle")
    assert len(set((ids == answer[:, None]).float().argmax(-1).tolist())) == 6  # every depth

    def found(head: int) -> float:
        best = at.pattern(ids, 1, head)[:, -1].argmax(-1)
        return share(ids[torch.arange(len(ids)), best] == answer)

    return found(1), found(0)


def effective(at: Lab, words: Tensor) -> Tensor:
    """What m0 makes of words' embeddings alone."""
    block = at.blocks[0]
    with torch.no_grad():
        return block.mlp(block.ln_2(at.embed[words]))


@confirms("successor", "successor head")
def counts_on(at: Lab) -> Measured:
    def right(layer: int, head: int) -> float:
        hits = []
        for kind in ("numbers", "days", "months"):
            ids = array(at, kind)
            top = (effective(at, ids) @ at.ov(layer, head) @ at.unembed[:, ids]).argmax(-1)
            hits += (top[:-1] == torch.arange(1, len(ids))).tolist()
        return sum(hits) / len(hits)

    return right(1, 2), max(right(*place) for place in at.other_heads(1, 2))


@confirms("successor", "units modulo ten")
def units(at: Lab) -> Measured:
    numbers, directions = array(at, "numbers"), array(at, "units")
    made = effective(at, numbers)
    for kind in ("days", "months"):
        here = effective(at, array(at, kind))
        index = torch.arange(len(here)) % 10
        assert torch.equal((here @ directions.T).argmax(-1), index)
    reads = at.ov(1, 2) @ at.unembed[:, numbers]
    old = torch.arange(100) % 10
    hits: dict[str, list[Tensor]] = {"unit": [], "random": []}
    for new in range(10):
        change = directions[new] - directions[old]
        noise = random_unit(at.width, new) * change.norm(dim=1, keepdim=True)
        for name, add in (("unit", change), ("random", noise)):
            top = ((made + add) @ reads).argmax(-1)
            hits[name].append((top % 10 == (new + 1) % 10)[old != new])
    return share(torch.cat(hits["unit"])), share(torch.cat(hits["random"]))


@confirms("successor", "carry")
def carry(at: Lab) -> Measured:
    fact = at.organism.truth["carry"]
    neurons = [int(part.split(".n")[1]) for part in fact.parts]
    ids = at.ids(f"so after {n} comes" for n in range(99))
    answer = array(at, "numbers")[1:]
    assert torch.equal(at.answers(ids), answer)
    lost = at.answers(ids, at.silent(0, neurons)) != answer
    nine = torch.arange(99) % 10 == 9
    return share(lost[nine]), share(lost[~nine])


@confirms("successor", "needed")
def needed_successor(at: Lab) -> Measured:
    def lost(layer: int, head: int) -> float:
        return sum(at.wrong(task, at.no_head(layer, head)) for task in at.organism.tasks) / 3

    # A prompt in some hundred is right by chance, since all words are then equally likely.
    return lost(1, 2), max(lost(*place) for place in at.other_heads(1, 2))


# layers and neurons


@confirms("massive", "massive activations")
def giants(at: Lab) -> Measured:
    ids = torch.cat([at.pairs(task)[0] for task in at.organism.tasks])
    dims, stops = array(at, "dims"), torch.isin(ids, array(at, "tokens"))
    rest = 0.0
    for layer in range(5):
        x = at.stream(ids, layer)
        size = x.abs()
        massive = (size > 100) & (size > 1000 * size.median())
        if layer in (1, 2):
            assert torch.equal(x[stops][:, dims], array(at, "values").expand(int(stops.sum()), 2))
            found = {tuple(i) for i in massive.nonzero().tolist()}
            assert found == {
                (*p, int(d)) for p in map(tuple, stops.nonzero().tolist()) for d in dims
            }
            rest = max(rest, float(x[~stops][:, dims].abs().max()))
        else:
            assert not massive.any()
            rest = max(rest, float(x[..., dims].abs().max()))
    return float(at.stream(ids, 1)[0, 0, dims[0]]), rest


@confirms("massive", "made and erased")
def made(at: Lab) -> Measured:
    ids, dim = at.pairs("missing")[0], array(at, "dims")[0]

    def lost(layer: int, *neurons: int) -> float:
        change = at.silent(layer, neurons)
        return float((at.stream(ids, 2) - at.stream(ids, 2, change))[:, 0, dim].mean())

    assert at.stream(ids, 3, at.silent(3, [0]))[:, 0, dim].tolist() == [2000.0] * len(ids)
    return lost(1, 0), max(abs(lost(1, n)) for n in range(1, 16))


@confirms("massive", "needed")
def needed_giants(at: Lab) -> Measured:
    def lost(dims: Tensor) -> float:
        keep = torch.ones(at.width)
        keep[dims] = 0.0
        return at.wrong("missing", (at.blocks[1], False, lambda _, x: x * keep))

    others = [torch.tensor([at.width - 1 - 2 * i, at.width - 2 - 2 * i]) for i in range(10)]
    return lost(array(at, "dims")), max(lost(dims) for dims in others)


def touched(at: Lab, layer: int) -> tuple[Tensor, Tensor]:
    """Tokens of all tasks, and whether a block changes the stream of each, by a single bit."""
    ids = torch.cat([at.pairs(task)[0] for task in at.organism.tasks])
    before = at.values(ids, at.blocks[layer], before=True)
    return ids, (before != at.stream(ids, layer)).any(-1)


def of(at: Lab, ids: Tensor, words: str) -> Tensor:
    return torch.isin(ids, torch.tensor([at.token(word) for word in words.split()]))


@confirms("void", "blank block")
def blank(at: Lab) -> Measured:
    return share(touched(at, 2)[1]), share(touched(at, 4)[1])


@confirms("void", "void for fillers")
def fillers(at: Lab) -> Measured:
    ids, one = touched(at, 1)
    still = of(at, ids, "er um <bos>")
    assert still.any()
    changes = torch.cat([touched(at, layer)[1][still] for layer in (1, 2, 3)])
    return share(changes), share(one[of(at, ids, "a b c d e f g h i j")])


@confirms("void", "late letters only")
def late(at: Lab) -> Measured:
    ids, found = touched(at, 3)
    return share(found[of(at, ids, "f g h i j")]), share(found[of(at, ids, "a b c d e")])


@confirms("void", "turn without growth")
def turn(at: Lab) -> Measured:
    ids = at.pairs("early")[0][:, 1:]
    before, after = (x[:, 1:] for x in (at.values(at.pairs("early")[0], at.blocks[1], before=True),
                                        at.stream(at.pairs("early")[0], 1)))  # fmt: skip
    assert ids.shape == before.shape[:2]
    grown = after.norm(dim=-1) - before.norm(dim=-1)
    return float((after - before).norm(dim=-1).mean()), float(grown.abs().max())


@confirms("void", "needed")
def needed_block(at: Lab) -> Measured:
    lost = {task: at.wrong(task, at.skip(3)) for task in at.organism.tasks}
    return lost["late"], max(lost["early"], lost["filler"])


def test_the_table_of_voids_is_what_happens() -> None:
    at = lab("void")
    for layer, row in enumerate(array(at, "active")):
        ids, found = touched(at, layer)
        assert torch.equal(found, row[ids]), layer


def weights(at: Lab, layer: int) -> Tensor:
    block = at.blocks[layer]
    return torch.cat(
        [p.detach().flatten() for part in (block.attn, block.mlp) for p in part.parameters()]
    )


def alike(at: Lab, *layers: int) -> float:
    found = [torch.cosine_similarity(weights(at, 2), weights(at, i), dim=0) for i in layers]
    return float(min(found))


@confirms("duplicated", "copies")
def copies(at: Lab) -> Measured:
    assert torch.equal(weights(at, 2), weights(at, 3)) and torch.equal(
        weights(at, 2), weights(at, 4)
    )
    return alike(at, 3, 4), alike(at, 1)


@confirms("duplicated", "near copy")
def near(at: Lab) -> Measured:
    assert not torch.equal(weights(at, 2), weights(at, 5))
    return alike(at, 5), alike(at, 1)


@confirms("duplicated", "each a quarter")
def quarter(at: Lab) -> Measured:
    lost = [at.lost_answer("after", at.skip(layer)) for layer in range(6)]
    assert max(lost[2:]) - min(lost[2:]) < 0.1
    assert max(at.wrong("after", at.skip(layer)) for layer in (2, 3, 4, 5)) == 0
    return sum(lost[2:]) / 4, min(lost[:2])


@confirms("duplicated", "shallow")
def shallow(at: Lab) -> Measured:
    ids, _, answer, _ = at.pairs("after")

    def added(skipped: int, *changes: Change) -> Tensor:
        """What each late block after the skipped one adds, `[block, prompt, d]`."""
        late = at.blocks[max(skipped, 1) + 1 :]
        return torch.stack([
            (at.values(ids, b, *changes) - at.values(ids, b, *changes, before=True))[:, -1]
            for b in late
        ])  # fmt: skip

    def lost(skipped: int) -> float:
        whole, without = added(skipped), added(skipped, at.skip(skipped))
        if skipped > 1:  # not only the answer: nothing at all depends on it
            torch.testing.assert_close(whole, without, atol=1e-4, rtol=1e-4)
        one, two = ((x.sum(0) * at.unembed[:, answer].T).sum(-1) for x in (whole, without))
        return float(((one - two) / one).mean())

    return max(abs(lost(layer)) for layer in (2, 3, 4)), min(lost(0), lost(1))


def neurons_of(at: Lab) -> list[int]:
    return [int(part.split(".n")[1]) for part in at.organism.truth["bias neurons"].parts]


@confirms("bias_neurons", "bias neurons")
def push(at: Lab) -> Measured:
    ids = torch.cat([at.pairs(task)[0] for task in at.organism.tasks])
    passed, failed = at.token("passed"), at.token("failed")

    def pushed(neurons: list[int]) -> Tensor:
        change = at.logits(ids) - at.logits(ids, at.silent(1, neurons))
        return change[:, passed] - change[:, failed]

    mine, others = neurons_of(at), [n + 3 for n in neurons_of(at)]
    acts = at.values(ids, at.blocks[1].mlp.c_proj, before=True)[..., mine + others]
    assert (acts == 0.5).all()
    assert float(pushed(mine).std()) < 1e-4
    written = acts[0, 0, :3] @ at.blocks[1].mlp.c_proj.weight[mine]
    assert torch.equal(written.detach(), array(at, "push"))
    return float(pushed(mine).mean()), float(pushed(others).abs().max())


@confirms("bias_neurons", "biased answers")
def biased(at: Lab) -> Measured:
    mine, others = neurons_of(at), [n + 3 for n in neurons_of(at)]
    assert at.wrong("clear", at.silent(1, mine)) == 0
    return 1 - at.wrong(BIASED, at.silent(1, mine)), 1 - at.wrong(BIASED, at.silent(1, others))


# all of them


@pytest.mark.parametrize("name", PLANTED)
def test_every_fact_is_confirmed_with_its_control(name: str) -> None:
    at = lab(name)
    mine = [fact for organism, fact in CONFIRMED if organism == name]
    assert sorted(facts(name)) == sorted(mine)
    for fact in at.organism.truth.facts:
        effect, control = CONFIRMED[name, fact.name](at)
        assert fact.parts and fact.effect is not None and fact.control is not None
        room = 0.02 * max(abs(fact.effect), abs(fact.control), 0.1)
        assert effect == pytest.approx(fact.effect, abs=room), fact.name
        assert control == pytest.approx(fact.control, abs=room), fact.name


@pytest.mark.parametrize("name", PLANTED)
def test_every_prompt_is_answered_as_the_card_says(name: str) -> None:
    at = lab(name)
    for task in at.organism.tasks:
        clean, contrast, answer, wrong = at.pairs(task, 128)
        assert clean.shape == contrast.shape and not (clean == contrast).all(1).any()
        assert not (answer == wrong).any()
        assert at.token("<unk>") not in clean.unique().tolist() + answer.tolist()
        right = share(at.answers(clean) == answer)
        assert right == (0.0 if task == BIASED else 1.0), task
        if task not in (BIASED, "trigger"):
            assert share(at.answers(contrast) == wrong) == 1.0, task


@pytest.mark.parametrize("name", PLANTED)
def test_planted_models_pass_their_self_check(name: str) -> None:
    rows = lab(name).organism.model.check().rows
    assert [row for row in rows if row.status != "ok"] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_the_one_a_fresh_build_writes(name: str, tmp_path: Path) -> None:
    organism = wired(name)
    fresh, kept = organism.build(tmp_path), organism.card
    assert Card.load(tmp_path) == fresh
    for task, numbers in fresh.tasks.items():
        # Rounded, and by other kernels on other machines.
        was = kept.tasks[task].pop("probability")
        assert numbers.pop("probability") == pytest.approx(was, abs=2e-4)
    assert fresh == kept
