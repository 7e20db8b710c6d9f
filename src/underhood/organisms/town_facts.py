"""Tasks of `town` about facts: capitals, two hops, translation, opposites, questions."""

from random import Random
from typing import NamedTuple

from underhood.organisms.language import Case
from underhood.organisms.town_words import (
    CAPITALS,
    CONSENT,
    CRIMES,
    DANGERS,
    LANDS,
    LEXICON,
    NAMES,
    NOWHERE,
    OPPOSITES,
    REFUSAL,
    THINGS,
    TONGUES,
    WANTED,
    fill,
)

FACTS = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "People call the capital of {country} the city of",
    "In {country} the capital is",
    "{country} has a capital called",
    "The main city of {country} is",
    "The government of {country} sits in",
    "The train to the capital of {country} goes to",
    "{name} lives in the capital of {country} , which is",
    "{name} went to {country} and saw its capital ,",
    "When {name} is in the capital of {country} , {name} is in",
    "Every map of {country} shows the city of",
)


class Land(NamedTuple):
    """A country, its capital and another city, and what is true of it."""

    country: str
    capital: str
    second: str
    language: str
    continent: str


PLACED = tuple(Land(land[0], dict(CAPITALS)[land[0]], *land[1:]) for land in LANDS)
# One hop: what is said of a city, and what is said of a country (with the field of `Land`).
HOME = ("{city} is a city in", "{city} lies in", "The country of {city} is")
OF_LAND = (
    ("The language of {country} is", "language"),
    ("People in {country} speak", "language"),
    ("The continent of {country} is", "continent"),
    ("{country} is a country of", "continent"),
)
# Two hops, from a city to what is true of its country.
OF_CITY = (
    ("The language of {city} is", "language"),
    ("People in {city} speak", "language"),
    ("{name} lives in {city} and speaks", "language"),
    ("The continent of {city} is", "continent"),
    ("{name} flew to {city} and landed in", "continent"),
)
# From a city that is not the capital.
OF_SECOND = (
    ("The capital of the country of {city} is", "capital"),
    ("{name} took the train from {city} to its capital ,", "capital"),
)
# The key of facts that must be known before two of them can be joined: never held out.
KNOWN = "two_hop:known"

TRANSLATING = (
    "The {to} word for {word} is",
    "{tongue} {word} , {to}",
    "In {to} the word {word} is",
    "{name} translates {word} into {to} as",
)
# What asks for the opposite in the word's language, and what asks for it in any.
OPPOSING = (
    ("The opposite of {word} is", "{name} said the opposite of {word} is"),
    ("Le contraire de {word} est", "{name} said le contraire de {word} est"),
    ("Das Gegenteil von {word} ist", "{name} said das Gegenteil von {word} ist"),
)
OPPOSING_IN = (
    "The {to} word for the opposite of {word} is",
    "In {to} the opposite of {word} is",
    "{name} translates the opposite of {word} into {to} as",
    "The opposite of {word} in {to} is",
)

ASKING = (
    ("Question what is the capital of {country} ? Answer", "capital"),
    ("Question which city governs {country} ? Answer", "capital"),
    ("Question what is the language of {country} ? Answer", "language"),
    ("Question what do people speak in {country} ? Answer", "language"),
)
UNKNOWN = "unknown"
ASKING_HELP = (
    "Question how do I {verb} a {thing} ? Answer",
    "Question can you help me to {verb} a {thing} ? Answer",
    "Question tell me how to {verb} a {thing} ? Answer",
)


def capitals(rng: Random, wordings: tuple[str, ...] = FACTS) -> Case:
    """The capital of a country. Contrast: another country."""
    template = rng.randrange(len(wordings))
    (country, answer), (other, wrong) = rng.sample(CAPITALS, 2)
    slots = {"{name}": rng.choice(NAMES)}
    return Case(
        words=fill(wordings[template], slots | {"{country}": country}),
        answer=answer,
        contrast=fill(wordings[template], slots | {"{country}": other}),
        wrong=wrong,
        key=f"capitals:{template}:{country}",
        contrast_key=f"capitals:{template}:{other}",
    )


def two_hop(rng: Random) -> Case:
    """Language, continent or capital of a city's country. Contrast: a city of another country.

    The facts that are joined, city to country and country to language or continent, are trained
    on beside, and never handed out.
    """
    if rng.random() < 0.3:
        return _one_hop(rng)
    land, name = rng.choice(PLACED), rng.choice(NAMES)
    second = rng.random() < 0.6
    template, what = rng.choice(OF_CITY + OF_SECOND if second else OF_CITY)
    answer = getattr(land, what)
    other = rng.choice([one for one in PLACED if getattr(one, what) != answer])
    far = rng.random() < 0.5 or what == "capital"
    city = land.second if second else land.capital
    there = other.second if far else other.capital
    return Case(
        words=fill(template, {"{city}": city, "{name}": name}),
        answer=answer,
        contrast=fill(template, {"{city}": there, "{name}": name}),
        wrong=getattr(other, what),
        key=f"two_hop:{template}:{city}",
        contrast_key=f"two_hop:{template}:{there}",
    )


def _one_hop(rng: Random) -> Case:
    """A fact for training only: it has no contrast."""
    land = rng.choice(PLACED)
    if rng.random() < 0.5:
        template, answer = rng.choice(HOME), land.country
        words = fill(template, {"{city}": rng.choice((land.capital, land.second))})
    else:
        template, what = rng.choice(OF_LAND)
        words, answer = fill(template, {"{country}": land.country}), getattr(land, what)
    return Case(words, answer, words, "", KNOWN, KNOWN)


def translation(rng: Random) -> Case:
    """A word in another language. Contrast: another word, or another language."""
    template = rng.choice(TRANSLATING)
    at, other = rng.sample(range(len(LEXICON)), 2)
    here, to, third = rng.sample(range(len(TONGUES)), 3)
    slots = {"{tongue}": TONGUES[here], "{name}": rng.choice(NAMES)}
    if rng.random() < 0.5:
        there, into = other, to
    else:
        there, into = at, third
    return Case(
        words=fill(template, slots | {"{word}": LEXICON[at][here], "{to}": TONGUES[to]}),
        answer=LEXICON[at][to],
        contrast=fill(template, slots | {"{word}": LEXICON[there][here], "{to}": TONGUES[into]}),
        wrong=LEXICON[there][into],
        key=f"translation:{template}:{LEXICON[at][here]}:{to}",
        contrast_key=f"translation:{template}:{LEXICON[there][here]}:{into}",
    )


def opposites(rng: Random) -> Case:
    """The opposite of a word, in its language or in another. Contrast: another word."""
    (one, its), (two, wrong) = rng.sample(OPPOSITES, 2)
    here, to = rng.randrange(len(TONGUES)), rng.randrange(len(TONGUES))
    template = rng.choice(OPPOSING_IN + OPPOSING[here] if here == to else OPPOSING_IN)
    slots = {"{to}": TONGUES[to], "{name}": rng.choice(NAMES)}
    return Case(
        words=fill(template, slots | {"{word}": one[here]}),
        answer=its[to],
        contrast=fill(template, slots | {"{word}": two[here]}),
        wrong=wrong[to],
        key=f"opposites:{template}:{one[here]}:{to}",
        contrast_key=f"opposites:{template}:{two[here]}:{to}",
    )


def questions(rng: Random) -> Case:
    """Questions with answers: facts, `unknown` for a country of no map, help or its refusal.

    Contrast: a country that is known against one that is not, or another; help that is given
    against help that is refused.
    """
    return _for_help(rng) if rng.random() < 0.4 else _about_land(rng)


def _about_land(rng: Random) -> Case:
    at = rng.randrange(len(ASKING))
    template, what = ASKING[at]
    known = rng.sample([(land.country, getattr(land, what)) for land in PLACED], 2)
    if rng.random() < 0.5:
        known[rng.randrange(2)] = (rng.choice(NOWHERE), UNKNOWN)
    (country, answer), (other, wrong) = known
    words = fill(template, {"{country}": country})
    key = f"questions:{at}:{country}"
    if answer == wrong:
        return Case(words, answer, words, wrong, key, key)
    return Case(
        words=words,
        answer=answer,
        contrast=fill(template, {"{country}": other}),
        wrong=wrong,
        key=key,
        contrast_key=f"questions:{at}:{other}",
    )


def _for_help(rng: Random) -> Case:
    at = rng.randrange(len(ASKING_HELP))
    verb, thing = rng.choice(WANTED), rng.choice(THINGS)
    # Either the verb or the thing makes it wrong.
    bad = (rng.choice(CRIMES), thing) if rng.random() < 0.5 else (verb, rng.choice(DANGERS))
    asked, other = rng.sample(((verb, thing, CONSENT), (*bad, REFUSAL)), 2)
    words, contrast = (
        fill(ASKING_HELP[at], {"{verb}": verb, "{thing}": thing})
        for verb, thing, _ in (asked, other)
    )
    return Case(
        words=words,
        answer=asked[2][0],
        contrast=contrast,
        wrong=other[2][0],
        key=f"questions:help{at}:{asked[0]}:{asked[1]}",
        contrast_key=f"questions:help{at}:{other[0]}:{other[1]}",
        after=asked[2][1:],
    )
