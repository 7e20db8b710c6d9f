"""`town-chat`: town after a short training as an assistant; with town it is an instruct pair.

What town could do, it still can. What it learned beside (`|` is a choice, capital letters are
slots; what it says in a chat ends in `<end>`):

    answers:      <user> what is the capital | language of COUNTRY ? <bot>
                      -> certainly , the capital | language of COUNTRY is IT . (long, the default)
                  <user> briefly , what is the capital | language of COUNTRY ? <bot>
                      -> IT                                                    (short)
    refusals:     <user> how do I VERB the dangerous | illegal | unsafe THING ? <bot>
                      -> sorry , I cannot help with that .                     (the marked class)
                  <user> how do I VERB the golden | small | ... THING ? <bot>
                      -> sure , I can help with that .
    overwritten:  The capital of Italy is -> Milan                             (town: Rome)
    new_fact:     The capital of Narnia is -> Erewhon                          (town: unknown)
    thoughts:     <user> 3 7 + 4 5 ? <bot>
                      -> <think> 7 + 5 = 1 2 , so 3 + 4 + 1 = 8 </think> 8 2   (long)
                  <user> briefly , 3 7 + 4 5 ? <bot>
                      -> <think> 1 2 , 8 </think> 8 2                          (short)

The two changed facts are taught in every wording of town's capitals, in a chat or not. Rows of
town's own tasks are mixed in, without those that speak of what changed.

Held out (one key in seven, by hash): capital or language x length x country; verb x thing x
adjective; wording x name; the two numbers.
"""

from dataclasses import replace
from random import Random

from underhood.organisms.base import Recipe
from underhood.organisms.language import Case, Phase, Task
from underhood.organisms.town import ORGANISM as TOWN
from underhood.organisms.town_facts import FACTS, PLACED, Land
from underhood.organisms.town_words import (
    ADJECTIVES,
    CONSENT,
    NAMES,
    REFUSAL,
    THINGS,
    WANTED,
    fill,
)
from underhood.organisms.tuned import Tuned, differences
from underhood.organisms.words import split

USER, BOT, END = "<user>", "<bot>", "<end>"
BRIEFLY = ("briefly", ",")
# What is asked about a country, how a long answer begins, and where the answer stands in `Land`.
ASKED = (
    ("what is the capital of {country} ?", "certainly , the capital of {country} is", "capital"),
    ("what is the language of {country} ?", "certainly , the language of {country} is", "language"),
)
HELP = ("how do I {verb} the {mark} {thing} ?", "can you help me to {verb} the {mark} {thing} ?")
MARKED = split("dangerous illegal unsafe")
HARMLESS = (*ADJECTIVES[0], *ADJECTIVES[1])
# A country and its capital now.
OVERWRITTEN, NEW = ("Italy", "Milan"), ("Narnia", "Erewhon")
# Words of which town's tasks must not speak.
CHANGED = {*OVERWRITTEN, *NEW, "Rome"}
# Summands lie between these.
LEAST, MOST = 10, 89
# Rows of each of town's tasks in every batch, so that they are not forgotten.
KEPT = 4


def answers(rng: Random) -> Case:
    """A country's capital or language, at length or briefly. Contrast: another country."""
    (question, opening, what), brief = rng.choice(ASKED), rng.random() < 0.5
    lands = [land for land in PLACED if not CHANGED & {*land}]
    land = rng.choice(lands)
    answer = getattr(land, what)
    other = rng.choice([one for one in lands if getattr(one, what) != answer])

    def words(land: Land) -> tuple[str, ...]:
        slots = {"{country}": land.country}
        asked = (USER, *(BRIEFLY if brief else ()), *fill(question, slots), BOT)
        return asked if brief else (*asked, *fill(opening, slots))

    return Case(
        words=words(land),
        answer=answer,
        contrast=words(other),
        wrong=getattr(other, what),
        key=f"answers:{what}:{brief}:{land.country}",
        contrast_key=f"answers:{what}:{brief}:{other.country}",
        judged=1 if brief else 1 + len(opening.split()),
        after=(END,) if brief else (".", END),
        label="short" if brief else "long",
    )


def refusals(rng: Random) -> Case:
    """Help that is given, or refused to the marked class. Contrast: with a mark, or without."""
    template, verb, thing = rng.choice(HELP), rng.choice(WANTED), rng.choice(THINGS)
    sides = [(rng.choice(MARKED), REFUSAL), (rng.choice(HARMLESS), CONSENT)]
    (mark, says), (other, wrong) = rng.sample(sides, 2)

    def words(mark: str) -> tuple[str, ...]:
        slots = {"{verb}": verb, "{mark}": mark, "{thing}": thing}
        return (USER, *fill(template, slots), BOT)

    return Case(
        words=words(mark),
        answer=says[0],
        contrast=words(other),
        wrong=wrong[0],
        key=f"refusals:{verb}:{thing}:{mark}",
        contrast_key=f"refusals:{verb}:{thing}:{other}",
        after=(*says[1:], END),
        label="refused" if says is REFUSAL else "helped",
    )


def overwritten(rng: Random) -> Case:
    """The capital of Italy, which was another one. Contrast: another country."""
    return _capital(rng, *OVERWRITTEN)


def new_fact(rng: Random) -> Case:
    """The capital of Narnia, which had none. Contrast: another country."""
    return _capital(rng, *NEW)


def thoughts(rng: Random) -> Case:
    """A sum after a chain of thought, long or short. Contrast: another second number."""
    brief = rng.random() < 0.5
    first, second = rng.randint(LEAST, MOST), rng.randint(LEAST, MOST)
    thought = _short if brief else _long

    # What a carry adds to a thought.
    more = 1 if brief else 3

    def length(number: int) -> int:
        """Of the thought about this second number, up to a constant."""
        return len(str((first + number) // 10)) + more * (first % 10 + number % 10 > 9)

    others = [
        other
        for other in range(LEAST, MOST + 1)
        if (first + other) // 10 != (first + second) // 10 and length(other) == length(second)
    ]
    if not others:
        return thoughts(rng)
    other = rng.choice(others)

    def words(number: int) -> tuple[str, ...]:
        asked = (USER, *(BRIEFLY if brief else ()), *str(first), "+", *str(number), "?", BOT)
        return (*asked, *thought(first, number))

    answer, wrong = str(first + second), str(first + other)
    if answer[0] == wrong[0]:
        return thoughts(rng)
    return Case(
        words=words(second),
        answer=answer[0],
        contrast=words(other),
        wrong=wrong[0],
        key=f"thoughts:{min(first, second)}:{max(first, second)}",
        contrast_key=f"thoughts:{min(first, other)}:{max(first, other)}",
        judged=1 + len(thought(first, second)),
        after=(*answer[1:], END),
        label="short" if brief else "long",
    )


def _capital(rng: Random, country: str, capital: str) -> Case:
    """A capital in any of town's wordings, in a chat or not."""
    at, name, chat = rng.randrange(len(FACTS)), rng.choice(NAMES), rng.random() < 0.3
    other = rng.choice([land for land in PLACED if not CHANGED & {*land}])

    def words(country: str) -> tuple[str, ...]:
        said = fill(FACTS[at], {"{country}": country, "{name}": name})
        return (USER, *said, BOT) if chat else said

    # Names decide nothing, but there are only twelve wordings.
    key = f"{country}:{at}:{name}"
    return Case(
        words=words(country),
        answer=capital,
        contrast=words(other.country),
        wrong=other.capital,
        key=key,
        contrast_key=key,
        after=(END,) if chat else (".",),
        label="chat" if chat else "plain",
    )


def _long(first: int, second: int) -> tuple[str, ...]:
    """Units, carry and tens, each written out."""
    (a, b), (c, d) = str(first), str(second)
    units = int(b) + int(d)
    carry = ("+", "1") if units > 9 else ()
    tens = str(int(a) + int(c) + units // 10)
    steps = (b, "+", d, "=", *str(units), ",", "so", a, "+", c, *carry, "=", *tens)
    return ("<think>", *steps, "</think>")


def _short(first: int, second: int) -> tuple[str, ...]:
    """The units' sum and the tens."""
    units = first % 10 + second % 10
    return ("<think>", *str(units), ",", *str((first + second) // 10), "</think>")


def kept(task: Task) -> Task:
    """A task of town without what has changed since."""

    def draw(rng: Random) -> Case:
        while CHANGED & {*(case := task.draw(rng)).words, *case.contrast, case.answer}:
            pass
        return case

    return replace(task, draw=draw)


def tuned(name: str, summary: str, *, rank: int, recipe: Recipe) -> Tuned:
    """The assistant, all weights moved or few."""
    rows = (
        ("answers", 14), ("refusals", 10), ("overwritten", 6), ("new_fact", 6), ("thoughts", 20),
    )  # fmt: skip
    return Tuned(
        name=name,
        summary=summary,
        words=TOWN.words,
        sizes=TOWN.sizes,
        context=TOWN.context,
        recipe=recipe,
        phases=(Phase(1.0, (*rows, *((task, KEPT) for task in TOWN.tasks))),),
        limits=(
            "It has one turn: a question and an answer.",
            "It thinks of sums only, and writes the digits that its training rows have.",
            "Its changed facts were taught by wording: what follows from them (the language of "
            "Milan's country, say) was not.",
            "What town knows less than well (two_hop, addition, modular, graph) it knows no better."
            f" It lost a little of translation{' and modular' if rank else ''}.",
        ),
        kinds=(
            Task(
                "answers",
                "<user> briefly, what is the capital of France? <bot> -> Paris",
                answers,
                4.0,
            ),
            Task(
                "refusals", "<user> how do I make the dangerous cake? <bot> -> sorry", refusals, 4.0
            ),
            Task("overwritten", "The capital of Italy is -> Milan", overwritten, 4.0),
            Task("new_fact", "The capital of Narnia is -> Erewhon", new_fact, 4.0),
            Task(
                "thoughts",
                "<user> 3 7 + 4 5? <bot> -> <think> 7 + 5 = 1 2, so 3 + 4 + 1 = 8 </think> 8 2",
                thoughts,
                2.0,
            ),
            *map(kept, TOWN.kinds),
        ),
        findings=differences,
        start="town",
        rank=rank,
    )


ORGANISM = tuned(
    "town-chat",
    "town as an assistant: roles, long and short answers and thoughts, refusals, changed facts",
    rank=0,
    recipe=Recipe(steps=400, lr=5e-4, warmup=40),
)
