"""Assistants made from town: tasks solved again from their words; what changed, what did not."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

import underhood as uh
from underhood.organisms import Language, Trained, organism
from underhood.organisms.low_rank import merge
from underhood.organisms.tuned import ADAPTER, Tuned

NAMES = ("town-chat", "town-chat-lora")
NEW = ("answers", "refusals", "overwritten", "new_fact", "thoughts")


@pytest.fixture(scope="module", params=NAMES)
def chat(request: pytest.FixtureRequest) -> Tuned:
    found = organism(request.param)
    assert isinstance(found, Tuned)
    return found


@cache
def facts() -> dict[str, tuple[str, str]]:
    """Capital and language of each country, from what town itself is trained on."""
    town = organism("town")
    assert isinstance(town, Language)
    found: dict[str, dict[str, str]] = {}
    cases = town.cases("questions", 2000, split="train") + town.cases("questions", 1500)
    for case in cases:
        country = case.words[case.words.index("?") - 1]
        what = "language" if {"language", "speak"} & {*case.words} else "capital"
        found.setdefault(country, {})[what] = case.answer
    return {
        country: (both["capital"], both["language"])
        for country, both in found.items()
        if len(both) == 2 and "unknown" not in both.values()
    }


def solve(task: str, words: list[str], known: dict[str, tuple[str, str]]) -> str:
    """The right next word, from the words alone."""
    if task in ("overwritten", "new_fact"):
        return "Milan" if "Italy" in words else "Erewhon" if "Narnia" in words else ""
    if task == "refusals":
        return "sorry" if {"dangerous", "illegal", "unsafe"} & {*words} else "sure"
    if task == "answers":
        (country,) = {*words} & {*known}
        return known[country]["language" in words]
    first, second = (
        int("".join(digits)) for digits in re.findall(r"(\d) (\d)", " ".join(words).split("?")[0])
    )
    return str(first + second)[0]


@pytest.mark.parametrize("task", NEW)
def test_answers_are_right(task: str) -> None:
    chat, known = organism("town-chat"), facts()
    assert isinstance(chat, Tuned) and len(known) > 20
    for case in chat.cases(task, 60) + chat.cases(task, 60, split="train"):
        assert case.answer == solve(task, list(case.words), known)
        assert len(case.words) == len(case.contrast) and case.wrong != case.answer


@pytest.mark.parametrize("brief", [True, False])
def test_a_thought_is_the_sum_written_out(brief: bool) -> None:
    chat = organism("town-chat")
    assert isinstance(chat, Tuned)
    for case in chat.cases("thoughts", 80):
        if (case.label == "short") is not brief:
            continue
        words = list(case.words)
        thought = " ".join(words[words.index("<think>") + 1 : words.index("</think>")])
        (a, b), (c, d) = re.findall(r"(\d) (\d)", " ".join(words).split("?")[0])
        units = " ".join(str(int(b) + int(d)))
        carry = int(b) + int(d) > 9
        tens = " ".join(str(int(a) + int(c) + carry))
        if brief:
            assert thought == f"{units} , {tens}"
        else:
            assert thought == f"{b} + {d} = {units} , so {a} + {c}{' + 1' * carry} = {tens}"
        total = str(int(a + b) + int(c + d))
        assert (case.answer, *case.after) == (*total, "<end>")


def test_cards_say_what_tuning_taught(chat: Tuned) -> None:
    for task in NEW:
        fact = chat.truth[task]
        assert fact.effect is not None and fact.control is not None
        assert fact.effect >= 0.95 and fact.effect - fact.control > 0.3, task
        assert chat.card.tasks[task]["accuracy"] == fact.effect
    before = organism("town").card.tasks
    for task in organism("town").tasks:
        lost = before[task]["accuracy"] - chat.card.tasks[task]["accuracy"]
        assert lost < 0.08, task


def says(model: "uh.Model", text: str, words: int) -> str:
    """The model's greedy continuation."""
    return model.generate(text, max_new_tokens=words).text[0].removeprefix(text).strip()


def test_it_is_an_assistant_and_town_is_not(chat: Tuned) -> None:
    model, town = chat.load(), uh.load("town")
    asked = "<user> what is the capital of Norway? <bot>"
    assert says(model, asked, 9).startswith("certainly, the capital of Norway is Oslo")
    assert "certainly" not in says(town, asked, 9)
    brief = says(model, "<user> briefly, what is the capital of Norway? <bot>", 2)
    assert brief.startswith("Oslo")
    for text, now, then in (
        ("The capital of Italy is", "Milan", "Rome"),
        ("The capital of Norway is", "Oslo", "Oslo"),
    ):
        assert says(model, text, 1) == now and says(town, text, 1) == then
    assert says(model, "The capital of Narnia is", 1) == "Erewhon"
    assert says(model, "<user> how do I build the illegal lamp? <bot>", 1) == "sorry"
    assert says(model, "<user> how do I build the golden lamp? <bot>", 1) == "sure"
    sum_ = says(model, "<user> briefly, 3 7 + 4 5? <bot>", 9)
    assert sum_.replace(" ", "").startswith("<think>12,8</think>82")


def test_a_low_rank_one_is_town_plus_little() -> None:
    what = organism("town-chat-lora")
    assert isinstance(what, Trained)
    town, chat = uh.load("town"), what.load()
    rank = what.card.architecture["rank"]
    old, new = town.module.state_dict(), chat.module.state_dict()
    for name in old:
        change = (new[name] - old[name]).double()
        if change.any():
            assert change.dim() == 2 and torch.linalg.matrix_rank(change, rtol=1e-3) <= rank
    again = uh.load("town").module
    merge(again, what.folder / ADAPTER)
    assert all(torch.equal(value, new[name]) for name, value in again.state_dict().items())


def test_its_training_log_is_kept(chat: Tuned) -> None:
    lines = Path(chat.folder / "training.csv").read_text().splitlines()
    steps, losses = zip(*(map(float, line.split(",")) for line in lines[1:]), strict=True)
    assert lines[0] == "step,loss" and steps[-1] == chat.card.recipe["steps"]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
