"""The grammar of town: every prompt is solved again from its words, by other means."""

import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import combinations
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from underhood.organisms import PUNCTUATION, SPECIAL, Case, Language, Split, held_out, organism
from underhood.organisms.town_words import (
    ADJECTIVES,
    ADVERBS,
    BAD,
    CAPITALS,
    CHAT,
    CRIMES,
    DANGERS,
    DAYS,
    DOING,
    GOOD,
    LANDS,
    LEXICON,
    MONTHS,
    NAMES,
    NOWHERE,
    NUMBERS,
    OPPOSITES,
    SPARE,
    THINGS,
    TOPICS,
)

Words = tuple[str, ...]
TASKS = (
    "indirect_object", "induction", "capitals", "successors", "greater_than", "agreement", "mood",
    "two_hop", "boxes", "moves", "addition", "modular", "style", "topic", "translation",
    "opposites", "needle", "graph", "questions",
)  # fmt: skip


# --- solvers: words of a prompt -> all right next words


def the_one(found: "list[str] | set[str]") -> str:
    (word,) = found
    return word


def indirect_object(words: Words) -> set[str]:
    return {word for word, count in Counter(words).items() if word in NAMES and count == 1}


def induction(words: Words) -> set[str]:
    return {words[words.index(words[-1]) + 1]}


def capitals(words: Words) -> set[str]:
    return {dict(CAPITALS)[the_one({word for word in words if word in dict(CAPITALS)})]}


def successors(words: Words) -> set[str]:
    items = [w for w in words if w in DAYS + MONTHS + NUMBERS]
    for kind in (DAYS, MONTHS, NUMBERS):
        if items[-1] in kind:
            at = [kind.index(item) for item in items]
            assert all(b == (a + 1) % len(kind) for a, b in zip(at, at[1:], strict=False))
            return {kind[(at[-1] + 1) % len(kind)]}
    raise AssertionError(words)


def greater_than(words: Words) -> set[str]:
    found = re.search(r"the year (\d\d) (\d\d) to the year (\d\d)$", " ".join(words))
    assert found and found[1] == found[3]
    return {f"{year:02d}" for year in range(int(found[2]) + 1, 100)}


def agreement(words: Words) -> set[str]:
    # "The cup near", "In the park the cup with", "Mary said that the cup from".
    at = {"The": 1, "In": 4}.get(words[0], 4)
    assert words[at - 1] in ("The", "the") and words[at + 1] in ("near", "that", "with", "from")
    subject = words[at]
    return {"are" if subject not in THINGS else "is"}


def mood(words: Words) -> set[str]:
    adjective = the_one([word for word in words if word in GOOD + BAD])
    return {"happy" if (adjective in GOOD) != ("not" in words) else "sad"}


def land_of(word: str) -> dict[str, str]:
    for country, second, language, continent in LANDS:
        capital = dict(CAPITALS)[country]
        if word in (country, second, capital):
            return {"capital": capital, "language": language, "continent": continent}
    raise AssertionError(word)


def two_hop(words: Words) -> set[str]:
    cities = {land[1] for land in LANDS} | {dict(CAPITALS)[land[0]] for land in LANDS}
    land = land_of(the_one([word for word in words if word in cities]))
    for what, signs in (
        ("language", {"language", "speak", "speaks"}),
        ("continent", {"continent", "landed"}),
        ("capital", {"capital"}),
    ):
        if signs & set(words):
            return {land[what]}
    raise AssertionError(words)


def tracked(words: Words) -> set[str]:
    """Follows every thing through the sentences, then reads the question."""
    where: dict[str, str] = {}
    *said, asked = " ".join(words).replace(" .", ".").split(". ")
    for sentence in said:
        for thing, box in re.findall(r"[Tt]he (\w+) is in box (\w)", sentence):
            where[thing] = box
        for thing, box in re.findall(r"moved the (\w+) to box (\w)", sentence):
            assert box not in where.values()
            where[thing] = box
    assert len(set(where.values())) == len(where)
    if found := re.fullmatch(r"The (\w+) is in box", asked):
        return {where[found[1]]}
    box = re.fullmatch(r"Box (\w) contains the", asked)
    assert box
    return {thing for thing, place in where.items() if place == box[1]}


def addition(words: Words) -> set[str]:
    found = re.fullmatch(r"(\d\d)\+(\d\d)=(\d*)", "".join(words))
    assert found
    total = str(int(found[1]) + int(found[2]))
    assert total.startswith(found[3])
    return {total[len(found[3])]}


def modular(words: Words) -> set[str]:
    units = the_one([word for word in words if word in ("days", "months", "hours")])
    ring = {"days": DAYS, "months": MONTHS, "hours": NUMBERS[:12]}[units]
    many = NUMBERS.index(words[words.index(units) - 1]) + 1
    start = the_one([w for at, w in enumerate(words) if w in ring and words[at + 1] != units])
    for _ in range(many):
        start = ring[0] if start == ring[-1] else ring[ring.index(start) + 1]
    return {start}


def style(words: Words) -> set[str]:
    kind = words[1] in ADJECTIVES[1]
    if len(words) == 3:
        return set(DOING[kind])
    return set(ADVERBS) if kind else {"."}


def topic(words: Words) -> set[str]:
    about = {name for name, nouns in TOPICS.items() if set(nouns) & set(words)}
    assert len(about) == 1
    return about if words[-4:] == ("This", "is", "about", "the") else set(TOPICS[about.pop()])


def meaning(word: str) -> tuple[int, int]:
    """The place of a word in the lexicon: its meaning and its language."""
    (found,) = [(at, row.index(word)) for at, row in enumerate(LEXICON) if word in row]
    return found


def foreign(words: Words) -> tuple[str, int]:
    """The word that is asked about, and the language that is asked for."""
    tongues = ("English", "French", "German")
    said = the_one([word for word in words if any(word in row for row in LEXICON)])
    named = [word for word in words if word in tongues]
    return said, tongues.index(named[-1]) if named else meaning(said)[1]


def translation(words: Words) -> set[str]:
    said, to = foreign(words)
    at, source = meaning(said)
    assert source != to
    return {LEXICON[at][to]}


def opposites(words: Words) -> set[str]:
    said, to = foreign(words)
    return {other[to] for one, other in OPPOSITES if said in one}


def needle(words: Words) -> set[str]:
    told = re.findall(r"The secret word of (\w+) is (\S+) \.", " ".join(words))
    assert len(dict(told)) == len(told) > 1
    return {dict(told)[words[-2]]}


def graph(words: Words) -> set[str]:
    *walk, last = words[1:]
    steps = [set(step) for step in zip(walk, (*walk[1:], last), strict=True)]
    return {word for step in steps if last in step for word in step} - {last}


def questions(words: Words) -> set[str]:
    if "how" in words or "help" in words:
        wrong = set(words) & set(CRIMES + DANGERS)
        return {"sorry" if wrong else "sure"}
    country = the_one([w for w in words if w in NOWHERE or w in dict(CAPITALS)])
    if country in NOWHERE:
        return {"unknown"}
    return {land_of(country)["language" if {"language", "speak"} & set(words) else "capital"]}


SOLVERS: dict[str, Callable[[Words], set[str]]] = {
    "indirect_object": indirect_object, "induction": induction, "capitals": capitals,
    "successors": successors, "greater_than": greater_than, "agreement": agreement, "mood": mood,
    "two_hop": two_hop, "boxes": tracked, "moves": tracked, "addition": addition,
    "modular": modular, "style": style, "topic": topic, "translation": translation,
    "opposites": opposites, "needle": needle, "graph": graph, "questions": questions,
}  # fmt: skip


@pytest.fixture(scope="module")
def town() -> Language:
    return grammar()


def grammar() -> Language:
    found = organism("town")
    assert isinstance(found, Language)
    return found


@cache
def drawn(task: str, split: Split = "test") -> list[Case]:
    """The same cases for all tests: drawing held-out ones costs milliseconds each."""
    return grammar().cases(task, 80, 5, split)


def right(case: Case) -> set[str]:
    return set(case.accept or (case.answer,))


def test_tasks(town: Language) -> None:
    assert tuple(town.tasks) == TASKS == tuple(SOLVERS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(task: str, split: Split) -> None:
    for case in drawn(task, split):
        assert right(case) == SOLVERS[task](case.words), case
        assert case.answer in right(case)


@pytest.mark.parametrize("task", TASKS)
def test_all_judged_words_are_right(task: str) -> None:
    """With `judged` above 1 words of the prompt are foretold too: each must be the only one."""
    for case in drawn(task):
        for back in range(1, case.judged):
            assert SOLVERS[task](case.words[:-back]) == {case.words[-back]}


@pytest.mark.parametrize("task", TASKS)
def test_contrasts_turn_the_answer(task: str) -> None:
    for case in drawn(task):
        there = SOLVERS[task](case.contrast)
        assert len(case.contrast) == len(case.words)
        assert case.wrong in there and case.wrong not in right(case)
        # A span that begins in 01 may end in any year.
        assert (case.answer in there) == (task == "greater_than")


@pytest.mark.parametrize("task", TASKS)
def test_splits(task: str) -> None:
    assert all(held_out(case.key) and held_out(case.contrast_key) for case in drawn(task))
    assert not any(held_out(case.key) for case in drawn(task, "train"))


def test_facts_that_are_joined_are_in_training(town: Language) -> None:
    """Every city's country, and every country's language and continent, in sentences of one hop."""
    rng, seen = Random(1), set[frozenset[str]]()
    for _ in range(12_000):
        words = town.row("two_hop", rng).words
        seen.add(frozenset(word for word in words if word[0].isupper()))
    said = {pair for words in seen for pair in combinations(sorted(words), 2)}
    for country, second, language, continent in LANDS:
        for subject in (second, dict(CAPITALS)[country]):
            assert tuple(sorted((subject, country))) in said
        for other in (language, continent):
            assert tuple(sorted((country, other))) in said


def test_words(town: Language) -> None:
    assert len(set(town.words)) == len(town.words)
    assert town.words[: len(SPECIAL) + len(PUNCTUATION)] == SPECIAL + PUNCTUATION
    assert {*CHAT, *SPARE} <= set(town.words)
    rng = Random(0)
    for task in TASKS:
        for _ in range(200):
            row = town.row(task, rng)
            assert set(row.words) <= set(town.words)
            assert len(row.words) <= town.context


def test_a_meaning_has_one_word_in_each_language() -> None:
    forms = Counter(word for row in LEXICON for word in row)
    assert set(forms.values()) == {1}
    assert all(len(row) == 3 for row in LEXICON)
    # The opposite of the opposite is the word itself.
    assert all(dict(OPPOSITES)[other] == one for one, other in OPPOSITES)


def test_sums_are_held_out_in_both_orders() -> None:
    def pair(case: Case) -> frozenset[Words]:
        return frozenset((case.words[:2], case.words[3:5]))

    trained = {pair(case) for case in grammar().cases("addition", 2000, split="train")}
    assert not trained & {pair(case) for case in drawn("addition")}


def test_style_and_topic_are_independent(town: Language) -> None:
    seen: Counter[tuple[bool, str]] = Counter()
    lengths: dict[bool, set[int]] = {False: set(), True: set()}
    rng = Random(2)
    for _ in range(4000):
        words = town.row("style", rng).words
        ornate = words[2] in ADJECTIVES[1]
        seen[ornate, next(name for name, nouns in TOPICS.items() if words[3] in nouns)] += 1
        lengths[ornate].add(len(words))
    assert len(seen) == 2 * len(TOPICS)
    assert min(seen.values()) > 0.8 * max(seen.values())
    assert max(lengths[False]) < min(lengths[True])


# --- the heads that copy, straight from transformers


@pytest.fixture(scope="module")
def model(town: Language) -> Any:
    return AutoModelForCausalLM.from_pretrained(town.folder, attn_implementation="eager")


def repeats(town: Language) -> Tensor:
    """`<bos>` and 20 random words, twice, as ids `[row, 41]`."""
    rng, first = Random(3), len(SPECIAL) + len(PUNCTUATION)
    rows = [rng.sample(range(first, len(town.words)), 20) for _ in range(32)]
    return torch.tensor([[town.words.index("<bos>"), *row, *row] for row in rows])


def copied(model: Any, ids: Tensor) -> float:
    """How many words of the second copies are foretold."""
    with torch.no_grad():
        best = model(input_ids=ids).logits[:, 21:-1].argmax(-1)
    return float((best == ids[:, 22:]).float().mean())


def heads_of(town: Language, kind: str) -> list[tuple[int, int]]:
    (parts,) = [fact.parts for fact in town.card.facts if fact.name == f"{kind}: induction"]
    return [(int(part[1]), int(part[4:])) for part in parts]


def test_induction_heads_are_textbook(town: Language, model: Any) -> None:
    """One block looks at the word before, a later one at the word after the earlier copy."""
    ids = repeats(town)
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions
    at = torch.arange(21, 40)
    for kind, back in (("previous word", 1), ("own word", 0), ("copying", 19)):
        assert heads_of(town, kind)
        for layer, head in heads_of(town, kind):
            assert attention[layer][:, head, at, at - back].mean() > 0.5
    earlier = {layer for layer, _ in heads_of(town, "previous word")}
    assert max(earlier) < min(layer for layer, _ in heads_of(town, "copying"))


@pytest.mark.parametrize("kind", ["previous word", "own word", "copying"])
def test_copying_needs_the_heads_of_the_card(town: Language, model: Any, kind: str) -> None:
    """What these heads write is made zero in the weights."""
    ids, heads = repeats(town), heads_of(town, kind)
    whole = copied(model, ids)
    assert whole > 0.9
    size = model.config.hidden_size // model.config.num_attention_heads
    silent = deepcopy(model)
    for layer, head in heads:
        columns = silent.model.layers[layer].self_attn.o_proj.weight.data
        columns[:, head * size : (head + 1) * size] = 0
    assert copied(silent, ids) < 0.5 * whole
