"""Tasks of `town` that only the context answers: repeats, boxes, moves, needles, graphs."""

from random import Random

from underhood.organisms.language import Case
from underhood.organisms.repeats import repeated
from underhood.organisms.town_sentences import filler
from underhood.organisms.town_words import BOXES, NAMES, THINGS
from underhood.organisms.words import split

# Most words of a sequence that is repeated; one of these is drawn.
LENGTHS = (6,) * 6 + (12,) * 2 + (25,) * 3 + (50,)
# The first words are drawn oftener: the heads that copy form on them first, then for all.
COMMON = 100
MOVED = split("moved the")
BOXED = split("The the is in box Box contains")
ASKED = split("The secret word of")
# Words of a haystack, at most.
HAY = 90
WALK = "walk"
# Most words of a walk, and how many more it is trained on in its old tracks.
STEPS, FURTHER = 40, 10


def induction(rng: Random, words: tuple[str, ...]) -> Case:
    """A random sequence that starts again. Contrast: its deciding word changed, the first time."""
    # Short sequences, seen only twice, are common because they force the head that looks one word
    # back: over long ones a head that looks four back serves as well, and that is what is learned.
    length = rng.randint(2, rng.choice(LENGTHS))
    return repeated(rng, words if rng.random() < 0.5 else words[:COMMON], length)


def boxes(rng: Random) -> Case:
    """What a box contains. Contrast: another box."""
    return _boxes(rng, rng.choice((2, 3, 3, 4, 5, 6, 7)))


def few_boxes(rng: Random) -> Case:
    """The same with two or three boxes, a drill."""
    return _boxes(rng, rng.choice((2, 3)))


def _boxes(rng: Random, count: int) -> Case:
    things, labels = rng.sample(THINGS, count), rng.sample(BOXES, count)
    here, there = rng.sample(range(count), 2)
    said = _inventory(things, labels)
    key = f"boxes:{':'.join((*things, *labels))}"
    return Case(
        words=(*said, "Box", labels[here], "contains", "the"),
        answer=things[here],
        contrast=(*said, "Box", labels[there], "contains", "the"),
        wrong=things[there],
        key=key,
        contrast_key=key,
    )


def moves(rng: Random) -> Case:
    """Where a thing is, or what a box contains, after moves. Contrast: another thing or box.

    A box never holds two things, so that both questions have one answer.
    """
    count, moved = rng.choice((2, 3)), rng.choice((1, 2))
    things, labels = rng.sample(THINGS, count), rng.sample(BOXES, count + 2)
    place = dict(zip(things, labels, strict=False))
    said = list(_inventory(things, labels[:count]))
    for _ in range(moved):
        thing, box = rng.choice(things), rng.choice([x for x in labels if x not in place.values()])
        place[thing] = box
        said += [rng.choice(NAMES), *MOVED, thing, "to", "box", box, "."]
    here, there = rng.sample(things, 2)
    key = f"moves:{' '.join(said)}"
    if rng.random() < 0.5:
        return Case(
            words=(*said, "The", here, "is", "in", "box"),
            answer=place[here],
            contrast=(*said, "The", there, "is", "in", "box"),
            wrong=place[there],
            key=key,
            contrast_key=key,
        )
    return Case(
        words=(*said, "Box", place[here], "contains", "the"),
        answer=here,
        contrast=(*said, "Box", place[there], "contains", "the"),
        wrong=there,
        key=key,
        contrast_key=key,
    )


def needle(rng: Random, words: tuple[str, ...]) -> Case:
    """The secret word of a person, said somewhere in a long text. Contrast: another person's."""
    length = rng.randint(0, 30) if rng.random() < 0.6 else rng.randint(30, HAY)
    return _needle(rng, words, rng.choice((2, 3)), length)


def few_needles(rng: Random, words: tuple[str, ...]) -> Case:
    """The same for two people and without a haystack, a drill."""
    return _needle(rng, words, 2, 0)


def _needle(rng: Random, words: tuple[str, ...], count: int, length: int) -> Case:
    people, secrets = rng.sample(NAMES, count), rng.sample(words, count)
    said: list[str] = []
    for person, secret in zip(people, secrets, strict=True):
        said += [*filler(rng, length // (count + 1)), *ASKED, person, "is", secret, "."]
    said += filler(rng, length // (count + 1))
    here, there = rng.sample(range(count), 2)
    key = f"needle:{':'.join((*people, *secrets))}"
    return Case(
        words=(*said, *ASKED, people[here], "is"),
        answer=secrets[here],
        contrast=(*said, *ASKED, people[there], "is"),
        wrong=secrets[there],
        key=key,
        contrast_key=key,
    )


def graph(rng: Random, words: tuple[str, ...]) -> Case:
    """A random walk on a small graph of words: next comes a neighbour. Contrast: two words swapped.

    All neighbours of the last word were beside it before, and any is right; the answer is where the
    walk went from there last time. The words swapped are the answer and one that is no neighbour.
    """
    near = rng.choice(GRAPHS)
    names = rng.sample(words, len(near))
    at = [rng.randrange(len(near))]
    seen: list[set[int]] = [set() for _ in near]
    ends = []
    while len(at) < STEPS:
        here = at[-1]
        there = rng.choice(near[here])
        seen[here].add(there)
        seen[there].add(here)
        at.append(there)
        if len(seen[there]) == len(near[there]):
            ends.append(len(at))
    if not ends:
        return graph(rng, words)
    at = at[: rng.choice(ends)]
    last = at[-1]
    track = list(at)
    while len(track) <= len(at) + FURTHER:
        here = max(i for i, node in enumerate(track[:-1]) if node == track[-1])
        track.append(track[here + 1])
    again, *further = track[len(at) :]
    stranger = rng.choice([node for node in range(len(near)) if node not in (last, *near[last])])
    swapped = list(names)
    swapped[again], swapped[stranger] = names[stranger], names[again]
    key = f"graph:{':'.join(sorted(names))}"
    return Case(
        words=(WALK, *(names[node] for node in at)),
        answer=names[again],
        contrast=(WALK, *(swapped[node] for node in at)),
        wrong=names[stranger],
        key=key,
        contrast_key=key,
        accept=tuple(names[node] for node in near[last]),
        after=tuple(names[node] for node in further),
    )


def _inventory(things: list[str], labels: list[str]) -> tuple[str, ...]:
    """`The book is in box A , the key is in box B .`"""
    said: list[str] = []
    for thing, label in zip(things, labels, strict=True):
        said += ["the" if said else "The", thing, "is", "in", "box", label, ","]
    return (*said[:-1], ".")


def ring(size: int) -> tuple[tuple[int, ...], ...]:
    """Neighbours of each node of a ring."""
    return tuple(((n - 1) % size, (n + 1) % size) for n in range(size))


def grid(rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Neighbours of each node of a grid, row by row."""
    spots = [(row, column) for row in range(rows) for column in range(columns)]
    return tuple(
        tuple(n for n, (r, c) in enumerate(spots) if abs(r - row) + abs(c - column) == 1)
        for row, column in spots
    )


GRAPHS = (ring(5), ring(6), ring(7), ring(8), grid(2, 3), grid(2, 4), grid(3, 3))
