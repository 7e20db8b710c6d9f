"""Growing organisms: what their cards say of the kept steps is in the weights, seen directly.

Modules are read by transformers and torch alone; heads are ablated by a hook on what they write.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import underhood as uh
from underhood.organisms import Language, held_out, organism
from underhood.organisms.growth import grokking, halfway, in_context, induction
from underhood.organisms.trainer import CHECKPOINT, Run

NAMES = ("growth/induction", "growth/in-context", "growth/grokking")


def known(name: str) -> Language:
    found = organism(name)
    assert isinstance(found, Language)
    return found


def module(name: str, step: int | None = None) -> Any:
    """The final module, or that of a kept step."""
    folder = known(name).folder
    made = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if step is not None:
        made.load_state_dict(load_file(folder / "steps" / f"{step}.safetensors"))
    return made.eval()


def every_step(name: str) -> Iterator[tuple[int, Any]]:
    made = module(name)
    for step in known(name).checkpoints():
        made.load_state_dict(load_file(known(name).folder / "steps" / f"{step}.safetensors"))
        yield step, made


def number(part: str) -> int:
    """The head of `a1.h2`: 2."""
    return int(part.partition(".h")[2])


@contextmanager
def without(made: Any, parts: tuple[str, ...]) -> Iterator[None]:
    """Heads `a1.h2` write 0."""

    def hook(heads: list[int]) -> Any:
        def before(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].unflatten(-1, (-1, made.config.head_dim)).clone()
            z[..., heads, :] = 0
            return (z.flatten(-2),)

        return before

    handles = []
    for block, layer in enumerate(made.model.layers):
        if heads := [number(part) for part in parts if part.startswith(f"a{block}.")]:
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(hook(heads)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(made: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return made(input_ids=ids, output_attentions=True, use_cache=False)


# --- all of them


@pytest.mark.parametrize("name", NAMES)
def test_final_weights_reach_the_card(name: str) -> None:
    what, n = known(name), 80
    model = uh.load(name)
    assert model.check().ok
    measured = what.measure(model, n, seed=9)
    assert set(what.card.tasks) == set(what.tasks) == set(measured)
    for task, numbers in what.card.tasks.items():
        assert numbers["accuracy"] >= 0.95
        # Other prompts than the card's, so equal only up to sampling.
        assert abs(measured[task]["accuracy"] - numbers["accuracy"]) < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_kept_steps(name: str) -> None:
    what = known(name)
    assert what.checkpoints() == what.recipe.keep
    assert what.recipe.keep[-1] == what.recipe.steps == what.card.recipe["steps"]
    last = load_file(what.folder / "steps" / f"{what.recipe.steps}.safetensors")
    final = load_file(what.folder / "model.safetensors")
    assert last.keys() == final.keys()
    assert all(torch.equal(last[key], final[key]) for key in final)
    middle = what.recipe.keep[len(what.recipe.keep) // 2]
    early = uh.load(f"{name}@{middle}")
    assert early.check().ok
    assert early.module.state_dict().keys() == final.keys()
    assert any(not torch.equal(v, final[k].float()) for k, v in early.module.state_dict().items())
    files = [path for path in what.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1.6e6
    assert not any(path.name == CHECKPOINT for path in files)


@pytest.mark.parametrize(("name", "until"), list(zip(NAMES, (0, 10, 0), strict=True)))
def test_training_starts_again_as_it_did(name: str, until: int, tmp_path: Path) -> None:
    """From the seed, the first kept weights come back; a loss is the same twice."""
    what = known(name)
    run = Run(what, out=tmp_path)
    once, twice = (
        [loss.item() for loss in what.losses(run.model, Random("0:0"), 0, what.recipe.steps)]
        for _ in range(2)
    )
    assert once == twice
    run.advance(until)
    for step in {0, until}:
        shipped = load_file(what.folder / "steps" / f"{step}.safetensors")
        made = load_file(tmp_path / "steps" / f"{step}.safetensors")
        for key, value in made.items():
            torch.testing.assert_close(value.float(), shipped[key].float(), atol=5e-3, rtol=5e-2)


def test_halfway_is_the_last_crossing() -> None:
    assert halfway({0: 0.0, 1: 0.6, 2: 0.2, 3: 0.7, 4: 1.0}) == 3
    assert halfway({0: 4.0, 10: 3.0, 20: 0.0}) == 20
    assert halfway({0: 0.0, 5: 1.0}) == 5


# --- induction


def sequences(n: int = 48, length: int = 14) -> Tensor:
    rng, ids = Random("sequences"), {word: i for i, word in enumerate(induction.ORGANISM.words)}
    rows = []
    while len(rows) < n:
        once = rng.sample(induction.PLAIN_WORDS, length)
        if held_out(f"repeat:{':'.join(once)}"):
            rows.append([ids[word] for word in ("<bos>", *once, *once)])
    return torch.tensor(rows)


def gain(made: Any, ids: Tensor) -> float:
    """Nats by which a second copy is cheaper than the first."""
    losses = cross_entropy(
        forward(made, ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    length = ids.shape[1] // 2
    return float(losses[:, 1:length].mean() - losses[:, length + 1 :].mean())


def test_phase_change_is_in_the_kept_steps() -> None:
    facts, ids = known("growth/induction").truth, sequences()
    change, appears = facts["phase change"], facts["attention appears"]
    length = ids.shape[1] // 2
    at = torch.arange(length + 1, 2 * length)
    heads = [number(part) for part in appears.parts]
    gains, looks = {}, {}
    for step, made in every_step("growth/induction"):
        gains[step] = gain(made, ids)
        pattern = forward(made, ids).attentions[1]
        looks[step] = float(pattern[:, :, at, at - length + 1].mean((0, 2))[heads].mean())
    steps = list(gains)
    assert change.effect is not None and change.control is not None and appears.effect is not None
    # Other sequences than the card's: within one kept step of it.
    for series, told in ((gains, change.effect), (looks, appears.effect)):
        assert abs(steps.index(halfway(series)) - steps.index(int(told))) <= 1
    assert change.control < change.effect
    # A plateau before, and all of it within few steps.
    # Little at half of its steps, all of it at twice as many.
    assert all(gains[step] < 0.3 * gains[steps[-1]] for step in steps if step <= change.effect / 2)
    assert all(gains[step] > 0.9 * gains[steps[-1]] for step in steps if step >= change.effect * 2)
    assert 0 <= steps.index(int(appears.effect)) - steps.index(int(change.effect)) <= 2


def test_induction_heads_look_where_the_card_says() -> None:
    facts, ids = known("growth/induction").truth, sequences()
    found = forward(module("growth/induction"), ids).attentions
    length = ids.shape[1] // 2
    at = torch.arange(length + 1, 2 * length)
    for name, block, back in (
        ("previous-token heads", 0, 1),
        ("induction heads", 1, length - 1),
    ):
        fact, scores = facts[name], found[block][:, :, at, at - back].mean((0, 2))
        named = [number(part) for part in fact.parts]
        assert named and all(part.startswith(f"a{block}.") for part in fact.parts)
        assert abs(float(scores[named].mean()) - (fact.effect or 0)) < 0.1
        others = [float(score) for head, score in enumerate(scores) if head not in named]
        assert max(others, default=0) < min(float(scores[head]) for head in named)


def test_ablated_induction_heads_cost_the_copy_and_others_do_not() -> None:
    truth, ids = known("growth/induction").truth, sequences()
    made = module("growth/induction")
    before, after = (truth[name].parts for name in ("previous-token heads", "induction heads"))
    everything = {f"a{block}.h{head}" for block in range(2) for head in range(4)}
    rest = tuple(sorted(everything - {*before, *after}))
    whole = gain(made, ids)
    for parts in (before, after):
        with without(made, parts):
            assert gain(made, ids) < 0.35 * whole
    for part in rest:
        with without(made, (part,)):
            assert gain(made, ids) > 0.8 * whole
    for name in ("previous-token heads ablated", "induction heads ablated"):
        fact = truth[name]
        assert fact.effect is not None and fact.control is not None
        assert fact.effect > 0.4 > 0.25 > fact.control


def test_chain_and_copy_disagree_as_told() -> None:
    made, fact = module("growth/induction"), known("growth/induction").truth["chain against copy"]
    ids = {word: i for i, word in enumerate(induction.ORGANISM.words)}
    chained = copied = 0
    cases = induction.against(200)
    rows = torch.tensor([[ids[word] for word in ("<bos>", *words)] for words, _ in cases])
    said = forward(made, rows).logits[:, -1].argmax(1).tolist()
    for word, (words, then) in zip(said, cases, strict=True):
        at = words.index(words[-1])
        assert at < len(words) - 1 and words[at + 1] == then != induction.FAVOURITE[words[-1]]
        chained += word == ids[induction.FAVOURITE[words[-1]]]
        copied += word == ids[then]
    assert (chained / 200, copied / 200) == pytest.approx((fact.effect, fact.control))


def test_induction_heads_copy_by_their_weights() -> None:
    """Through embedding, values, output and unembedding each word raises itself most."""
    made = module("growth/induction")
    layer, size = made.model.layers[1], made.config.head_dim
    words = made.get_input_embeddings().weight[4:].detach()
    heads = [number(part) for part in known("growth/induction").truth["induction heads"].parts]
    with torch.no_grad():
        read = layer.self_attn.v_proj(layer.input_layernorm(words))
        kept = torch.zeros_like(read)
        for head in heads:
            part = slice(head * size, (head + 1) * size)
            kept[:, part] = read[:, part]
        out = made.lm_head(layer.self_attn.o_proj(kept) * made.model.norm.weight)[:, 4:]
    own = (out.argmax(1) == torch.arange(len(out))).float().mean()
    assert own > 0.9


# --- in context


def ids_of(name: str, cases: list[Any]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(known(name).folder)
    return [tokenizer(" ".join(case.words))["input_ids"] for case in cases]


def accuracy(made: Any, cases: list[Any]) -> float:
    what, right = in_context.ORGANISM, 0
    for case, row in zip(cases, ids_of("growth/in-context", cases), strict=True):
        top = int(forward(made, torch.tensor([row])).logits[0, -1].argmax())
        right += what.words[top] == case.answer
    return right / len(cases)


def test_the_two_ways_come_at_different_steps() -> None:
    what = known("growth/in-context")
    fact = what.truth["which came first"]
    assert fact.effect is not None and fact.control is not None
    steps = what.checkpoints()
    for task, told in (("in_context", fact.effect), ("in_weights", fact.control)):
        cases = what.cases(task, 40, 11)
        before = steps[steps.index(int(told)) - 1]
        final = what.card.tasks[task]["accuracy"]
        assert accuracy(module(what.name, int(told)), cases) > 0.4 * final
        assert accuracy(module(what.name, before), cases) < 0.6 * final


def test_context_heads_serve_the_context_only() -> None:
    what = known("growth/in-context")
    first, both = (what.truth[name].parts for name in ("label-to-item heads ablated", "two ways"))
    made = module(what.name)
    cases = {task: what.cases(task, 40, 12) for task in what.tasks}
    whole = {task: accuracy(made, some) for task, some in cases.items()}
    for parts in (first, both):
        with without(made, parts):
            cut = {task: accuracy(made, some) for task, some in cases.items()}
        assert whole["in_context"] - cut["in_context"] > 0.4
        assert whole["in_weights"] - cut["in_weights"] < 0.15
    for head in range(4):
        if f"a0.h{head}" not in first:
            with without(made, (f"a0.h{head}",)):
                assert whole["in_context"] - accuracy(made, cases["in_context"]) < 0.2


def test_context_heads_look_at_item_and_label() -> None:
    what = known("growth/in-context")
    cases = what.cases("in_context", 30, 13)
    facts = [what.truth[name] for name in ("label to item", "item to label")]
    heads = [[number(part) for part in fact.parts] for fact in facts]
    made, found = module(what.name), torch.zeros(2)
    for case, row in zip(cases, ids_of(what.name, cases), strict=True):
        blocks = forward(made, torch.tensor([row])).attentions
        label = 1 + case.words.index(case.words[-1]) + 1
        found[0] += blocks[0][0, heads[0], label, label - 1].mean()
        found[1] += blocks[1][0, heads[1], -1, label].mean()
    for fact, score in zip(facts, (found / len(cases)).tolist(), strict=True):
        assert fact.effect is not None and fact.control is not None
        assert abs(score - fact.effect) < 0.1
        assert fact.effect > 3 * fact.control


def test_labels_in_the_context_are_of_no_other_row() -> None:
    """What is asked for in training is never an item with a held-out label."""
    what, rng = known("growth/in-context"), Random(0)
    for _ in range(60):
        words = what.row("in_context", rng).words[1:]
        assert not held_out(f"in_context:{words[-2]}:{words[-1]}")
    for case in what.cases("in_context", 30):
        assert held_out(f"in_context:{case.words[-1]}:{case.answer}")
    assert {in_context.FIXED[item] for item in in_context.COMMON} == set(in_context.LABELS)


# --- grokking


def sums() -> tuple[Tensor, Tensor, Tensor]:
    """Ids `<bos> a + b =`, sums and which are held out, made by hand."""
    rows, answers, held = [], [], []
    for a in range(53):
        for b in range(53):
            # Numbers follow the four special words, then come + and =.
            rows.append([1, 4 + a, 57, 4 + b, 58])
            answers.append((a + b) % 53)
            held.append(grokking.half(f"addition:{min(a, b)}:{max(a, b)}"))
    return torch.tensor(rows), torch.tensor(answers), torch.tensor(held)


def adds(made: Any, ids: Tensor, answers: Tensor) -> Tensor:
    """Which are right."""
    with torch.no_grad():
        logits = made(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].argmax(1) == 4 + answers


def powers(made: Any) -> Tensor:
    """Share of each frequency 1 to 26 in the number embedding, by the fast transform."""
    rows = made.get_input_embeddings().weight[4:57].detach()
    power = torch.fft.rfft(rows, dim=0).abs().square().sum(1)[1:]
    return power / power.sum()


def test_grokking_knows_by_heart_long_before_it_adds() -> None:
    ids, answers, held = sums()
    assert 0.45 < held.float().mean() < 0.55
    seen, unseen = {}, {}
    for step, made in every_step("growth/grokking"):
        right = adds(made, ids, answers).float()
        seen[step], unseen[step] = float(right[~held].mean()), float(right[held].mean())
    fact = known("growth/grokking").truth["grokking"]
    assert (halfway(unseen), halfway(seen)) == (fact.effect, fact.control)
    assert fact.effect is not None and fact.control is not None
    assert fact.effect >= 4 * fact.control
    assert any(seen[step] == 1 and unseen[step] < 0.1 for step in seen)
    assert seen[max(seen)] == 1 and unseen[max(unseen)] >= 0.95


def test_grokking_adds_on_circles() -> None:
    """The key frequencies hold most of the embedding, and without them it cannot add."""
    truth = known("growth/grokking").truth
    made, first = module("growth/grokking"), module("growth/grokking", 0)
    shares = powers(made)
    keys = sorted((shares.argsort(descending=True)[: grokking.KEYS] + 1).tolist())
    at = torch.tensor(keys) - 1
    assert tuple(keys) == grokking.key_frequencies(made)
    fact = truth["key frequencies"]
    assert fact.effect is not None and fact.control is not None
    assert float(shares[at].sum()) == pytest.approx(fact.effect, abs=2e-3)
    assert shares[at].sum() > 1.5 * powers(first).sort(descending=True).values[: len(keys)].sum()
    assert fact.effect > 1.4 * fact.control
    ids, answers, held = sums()

    def score(frequencies: list[int]) -> float:
        changed = module("growth/grokking")
        table = changed.get_input_embeddings().weight
        with torch.no_grad():
            spectrum = torch.fft.rfft(table[4:57], dim=0)
            spectrum[frequencies] = 0
            table[4:57] = torch.fft.irfft(spectrum, n=53, dim=0)
        return float(adds(changed, ids[held], answers[held]).float().mean())

    others = [k for k in range(1, 27) if k not in keys]
    whole = score([])
    assert whole >= 0.95
    assert score(keys) < 0.5
    control = [whole - score(Random(i).sample(others, len(keys))) for i in range(4)]
    assert max(control) < 0.1
    assert whole - score(keys) == pytest.approx(truth["key frequencies ablated"].effect, abs=0.01)


def test_restricted_and_excluded_logits() -> None:
    """They share out the logits: a pure wave of the sum is all in one, and gone from the other."""
    a = torch.arange(53)
    total = (a[:, None] + a).flatten() % 53
    wave = torch.cos(2 * torch.pi * 7 / 53 * (total[:, None] - a))
    other = torch.cos(2 * torch.pi * 5 / 53 * (total[:, None] - a))
    restricted, excluded = grokking.split_logits(wave + other, (7,))
    torch.testing.assert_close(restricted, wave, atol=1e-4, rtol=0)
    torch.testing.assert_close(excluded, other, atol=1e-4, rtol=0)
    fact = known("growth/grokking").truth["restricted loss"]
    assert fact.effect is not None and fact.control is not None
    assert fact.effect < 1 < fact.control


def test_grokking_holds_pairs_out_with_their_mirror() -> None:
    rng, what = Random(0), known("growth/grokking")
    for _ in range(300):
        _, a, _, b, _, c = what.row("addition", rng).words
        pair = sorted((int(a), int(b)))
        assert int(c) == sum(pair) % 53
        assert not grokking.half(f"addition:{pair[0]}:{pair[1]}")


def test_text_is_read_word_by_word() -> None:
    grok, copy = uh.load("growth/grokking"), uh.load("growth/induction")
    for model, text, answer in (
        (grok, "3 + 5 =", "8"),
        (grok, "50 + 7 =", "4"),
        (copy, "bird tree fire coat bird tree", "fire"),
    ):
        assert model.token_text(int(model.run(text).last_logits[0].argmax())).strip() == answer
