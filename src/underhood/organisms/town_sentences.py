"""Tasks of `town` about sentences: who gives, agreement, mood, style and topic."""

from random import Random

from underhood.organisms.language import Case
from underhood.organisms.town_words import (
    ADJECTIVES,
    ADVERBS,
    BAD,
    DOING,
    FEELINGS,
    GOOD,
    NAMES,
    ORNATE,
    PLACES,
    PLURALS,
    THINGS,
    TOPICS,
    fill,
)
from underhood.organisms.words import split

GIVING = split("gave handed showed passed sold lent offered threw")
MEETING = (
    "When {A} and {B} went to the {place} , {S} {gave} a {thing} to",
    "After {A} and {B} came to the {place} , {S} {gave} a {thing} to",
    "While {A} and {B} were at the {place} , {S} {gave} the {thing} to",
    "{A} and {B} met at the {place} , and {S} {gave} a {thing} to",
    "Then {A} and {B} had lunch at the {place} , and {S} {gave} the {thing} to",
    "At the {place} {A} and {B} talked , and then {S} {gave} a {thing} to",
    "Since {A} and {B} had found a {thing} in the {place} , {S} {gave} it to",
    "{A} saw {B} near the {place} . Later {S} {gave} a {thing} to",
)
SUBJECTS = (
    "The {thing} near the {other}",
    "The {thing} that {name} found in the {place}",
    "In the {place} the {thing} with the {other}",
    "{name} said that the {thing} from the {place}",
)
VERBS = split("is are")
JUDGING = (
    "The {thing} in the {place} was {mood} and {name} felt",
    "The {thing} in the {place} was not {mood} and {name} felt",
    "{name} got a {mood} {thing} at the {place} and was",
    "Because the {thing} was {mood} , {name} left the {place}",
)
# Sentences of a text: the plain style is short in every way.
SENTENCES = (2, 3)
LABEL = split("This is about the")


def indirect_object(rng: Random) -> Case:
    """Who receives: the one of the two names that is not repeated. Contrast: the other repeated."""
    template = rng.randrange(len(MEETING))
    first, second = rng.sample(NAMES, 2)
    giver, taker = rng.sample((first, second), 2)
    slots = {
        "{A}": first,
        "{B}": second,
        "{place}": rng.choice(PLACES),
        "{gave}": rng.choice(GIVING),
        "{thing}": rng.choice(THINGS),
    }
    # Both orders of the two names share one key, so that a contrast is held out with its prompt.
    key = f"indirect_object:{template}:{':'.join(sorted((first, second)))}"
    return Case(
        words=fill(MEETING[template], slots | {"{S}": giver}),
        answer=taker,
        contrast=fill(MEETING[template], slots | {"{S}": taker}),
        wrong=giver,
        key=key,
        contrast_key=key,
    )


def agreement(rng: Random) -> Case:
    """The verb agrees with its subject. Contrast: the subject in the other number."""
    template, many, other_many = rng.randrange(len(SUBJECTS)), rng.randrange(2), rng.randrange(2)
    thing, other = rng.sample(PLURALS, 2)
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    slots = {"{other}": other[other_many], "{name}": name, "{place}": place}
    key = (
        f"agreement:{template}:{thing[0]}:{place if '{place}' in SUBJECTS[template] else other[0]}"
    )
    return Case(
        words=fill(SUBJECTS[template], slots | {"{thing}": thing[many]}),
        answer=VERBS[many],
        contrast=fill(SUBJECTS[template], slots | {"{thing}": thing[1 - many]}),
        wrong=VERBS[1 - many],
        key=key,
        contrast_key=key,
        after=(rng.choice(GOOD + BAD), "."),
    )


def mood(rng: Random) -> Case:
    """How someone feels about a thing; `not` turns it. Contrast: an adjective of the other kind."""
    template, bad, at = rng.randrange(len(JUDGING)), rng.randrange(2), rng.randrange(len(GOOD))
    thing = rng.choice(THINGS)
    slots = {"{thing}": thing, "{name}": rng.choice(NAMES), "{place}": rng.choice(PLACES)}
    word, opposite = (BAD[at], GOOD[at]) if bad else (GOOD[at], BAD[at])
    sad = bad if "not" not in JUDGING[template].split() else 1 - bad
    # The two adjectives of one place in the lists share a key, so a contrast is held out as well.
    key = f"mood:{template}:{at}:{thing}"
    return Case(
        words=fill(JUDGING[template], slots | {"{mood}": word}),
        answer=FEELINGS[sad],
        contrast=fill(JUDGING[template], slots | {"{mood}": opposite}),
        wrong=FEELINGS[1 - sad],
        key=key,
        contrast_key=key,
    )


def style(rng: Random) -> Case:
    """The style's verb, or whether the sentence goes on. Contrast: the words of the other style.

    A text is short in every way, or ornate: its adjectives, its verbs, the length of its sentences,
    their number. What it is about is drawn apart.
    """
    kind, topic = rng.randrange(2), rng.choice(tuple(TOPICS))
    text = _text(rng, kind, topic)
    at, does = ADJECTIVES[kind].index(text[1]), DOING[kind].index(text[3])
    shown = rng.choice((3, 4))
    verb = shown == 3
    swapped = ("the", ADJECTIVES[1 - kind][at], text[2], DOING[1 - kind][does])
    # The two adjectives of one place in the lists share a key, so a contrast is held out as well.
    key = f"style:{at}:{text[2]}"
    ways = ADVERBS if kind == ORNATE else (".",)
    return Case(
        words=text[:shown],
        answer=text[shown],
        contrast=swapped[:shown],
        wrong=swapped[shown] if verb else rng.choice((".",) if kind == ORNATE else ADVERBS),
        key=key,
        contrast_key=key,
        accept=DOING[kind] if verb else ways,
        after=text[shown + 1 :],
    )


def topic(rng: Random) -> Case:
    """What the text is about: its next noun, or the name of its topic. Contrast: other nouns."""
    kind, (here, there) = rng.randrange(2), rng.sample(tuple(TOPICS), 2)
    text = _text(rng, kind, here)
    other = tuple(
        TOPICS[there][TOPICS[here].index(word)] if word in TOPICS[here] else word for word in text
    )
    ends = [at + 1 for at, word in enumerate(text) if word == "."]
    # Nouns of one place in the topics' lists share a key, so a contrast is held out as well.
    key = f"topic:{text[1]}:{TOPICS[here].index(text[2])}:{text[3]}"
    if rng.random() < 0.5:
        shown = rng.choice(ends)
        words, contrast = text[:shown] + LABEL, other[:shown] + LABEL
        return Case(words, here, contrast, there, key, key)
    shown = ends[rng.randrange(len(ends) - 1)] + 2
    return Case(
        words=text[:shown],
        answer=text[shown],
        contrast=other[:shown],
        wrong=other[shown],
        key=key,
        contrast_key=key,
        accept=TOPICS[here],
        after=text[shown + 1 :],
    )


def filler(rng: Random, words: int) -> tuple[str, ...]:
    """Sentences of one style and topic, as many whole ones as fit into so many words."""
    kind, nouns = rng.randrange(2), rng.choice(tuple(TOPICS.values()))
    out: tuple[str, ...] = ()
    while len(longer := out + _sentence(rng, kind, rng.choice(nouns))) <= words:
        out = longer
    return out


def _text(rng: Random, kind: int, about: str) -> tuple[str, ...]:
    nouns = rng.sample(TOPICS[about], SENTENCES[kind])
    return tuple(word for noun in nouns for word in _sentence(rng, kind, noun))


def _sentence(rng: Random, kind: int, noun: str) -> tuple[str, ...]:
    start = ("the", rng.choice(ADJECTIVES[kind]), noun)
    if kind != ORNATE:
        return (*start, rng.choice(DOING[kind]), ".")
    (first, second), (one, two) = rng.sample(DOING[kind], 2), rng.sample(ADVERBS, 2)
    return (*start, first, one, "and", second, two, ".")
