"""Tasks of `town` with an order: successors, spans of years, sums, days and months counted on."""

from random import Random

from underhood.organisms.language import Case
from underhood.organisms.town_words import (
    CENTURIES,
    DAYS,
    DIGITS,
    MONTHS,
    NAMES,
    NUMBERS,
    YEARS,
    fill,
)
from underhood.organisms.words import split

# Name, items, and whether the first follows the last.
CYCLES = (("day", DAYS, True), ("month", MONTHS, True), ("number", NUMBERS, False))
NEXT = (
    "The {kind} after {item} is",
    "The next {kind} after {item} is",
    "After the {kind} {item} comes",
    "{name} knows that the {kind} after {item} is",
    "{name} said {item} , and the next {kind} is",
)
# How a run is written: what stands between its items.
RUNS = ((), (",",), ("and",), ("then",))
# Items of a run in a training row; prompts show fewer.
RUN = 6

EVENTS = split(
    "war siege reign voyage strike festival trial drought journey dispute expedition building "
    "winter search hunt debate"
)
LASTING = ("lasted", "went on", "ran", "continued", "stretched", "was recorded")
SPAN = "The {event} {lasted} from the year {century} {year} to the year {century}"

# Of a sum.
SIGNS = ("+", "=")

# Counted round and round: name of many, items.
CLOCKS = (("days", DAYS), ("months", MONTHS), ("hours", NUMBERS[:12]))
# How far is counted.
STEPS = NUMBERS[1:12]
LATER = (
    "{many} {units} after {item} comes",
    "{name} says {item} , and {many} {units} later it is",
    "{many} {units} from {item} it is",
    "{name} said {item} , and {many} {units} after it comes",
)


def successors(rng: Random) -> Case:
    """What comes next among days, months, numbers. Contrast: another start of the same kind."""
    kind, items, cyclic = rng.choice(CYCLES)
    size = len(items)
    if rng.random() < 0.5:
        template = rng.randrange(len(NEXT))
        here, there = rng.sample(range(size if cyclic else size - 1), 2)
        slots = {"{kind}": kind, "{name}": rng.choice(NAMES)}
        return Case(
            words=fill(NEXT[template], slots | {"{item}": items[here]}),
            answer=items[(here + 1) % size],
            contrast=fill(NEXT[template], slots | {"{item}": items[there]}),
            wrong=items[(there + 1) % size],
            key=f"successors:{kind}:{template}:{items[here]}",
            contrast_key=f"successors:{kind}:{template}:{items[there]}",
        )
    style = rng.randrange(len(RUNS))
    here, there = rng.sample(range(size if cyclic else size - RUN + 1), 2)
    shown = rng.randint(2, RUN - 1)
    words = _run(items, here, RUNS[style])
    until = shown * (1 + len(RUNS[style]))
    return Case(
        words=words[:until],
        answer=words[until],
        contrast=_run(items, there, RUNS[style])[:until],
        wrong=items[(there + shown) % size],
        # Runs of one start share a key whatever is shown: a shorter one is part of a longer one.
        key=f"successors:{kind}:run{style}:{items[here]}",
        contrast_key=f"successors:{kind}:run{style}:{items[there]}",
        after=(*words[until + 1 :], "."),
    )


def greater_than(rng: Random) -> Case:
    """A span of years ends after it began. Contrast: it begins in 01, so any later year will do.

    `wrong` is a year that the contrast allows and the prompt forbids.
    """
    event, lasted, century = rng.choice(EVENTS), rng.choice(LASTING), rng.choice(CENTURIES)
    # A start in 01 forbids no year, so it has no contrast; it is drawn only to be trained on.
    start = rng.randint(1, 97)
    slots = {"{event}": event, "{lasted}": lasted, "{century}": century}
    key = f"greater_than:{event}:{lasted}:{century}"
    return Case(
        words=fill(SPAN, slots | {"{year}": YEARS[start - 1]}),
        answer=YEARS[rng.randint(start + 1, 99) - 1],
        contrast=fill(SPAN, slots | {"{year}": "01"}),
        wrong=YEARS[rng.randint(min(2, start), start) - 1],
        key=key,
        contrast_key=key,
        accept=YEARS[start:],
    )


def addition(rng: Random) -> Case:
    """The sum of two numbers of two digits, digit by digit. Contrast: another second number.

    All digits of the sum up to the answer are judged.
    """
    first, second = rng.randint(10, 99), rng.randint(10, 99)
    total = _digits(first + second)
    shown = rng.randrange(len(total))
    # One digit of the second number is changed, such that the sum stays as long.
    step = rng.choice((1, 10))
    digit = second // step % 10
    others = [second + (new - digit) * step for new in range(10) if new != digit]
    others = [
        other
        for other in others
        if other > 9
        and len(_digits(first + other)) == len(total)
        and _digits(first + other)[shown] != total[shown]
    ]
    words = _sum(first, second)
    key = _pair(first, second)
    if not others:
        return Case(words + total[:shown], total[shown], words + total[:shown], "", key, key)
    other = rng.choice(others)
    wrong = _digits(first + other)
    return Case(
        words=words + total[:shown],
        answer=total[shown],
        contrast=_sum(first, other) + wrong[:shown],
        wrong=wrong[shown],
        key=key,
        contrast_key=_pair(first, other),
        judged=shown + 1,
        after=(*total[shown + 1 :], "."),
    )


def modular(rng: Random) -> Case:
    """Days, months or hours counted on, round and round. Contrast: another start."""
    template, (units, items) = rng.randrange(len(LATER)), rng.choice(CLOCKS)
    size, step = len(items), rng.randrange(len(STEPS))
    here, there = rng.sample(range(size), 2)
    slots = {"{many}": STEPS[step], "{units}": units, "{name}": rng.choice(NAMES)}
    return Case(
        words=fill(LATER[template], slots | {"{item}": items[here]}),
        answer=items[(here + step + 2) % size],
        contrast=fill(LATER[template], slots | {"{item}": items[there]}),
        wrong=items[(there + step + 2) % size],
        key=f"modular:{template}:{units}:{STEPS[step]}:{items[here]}",
        contrast_key=f"modular:{template}:{units}:{STEPS[step]}:{items[there]}",
    )


def _run(items: tuple[str, ...], start: int, between: tuple[str, ...]) -> tuple[str, ...]:
    """`RUN` items from `start`, with `between` after each but the last."""
    out: list[str] = []
    for step in range(RUN):
        out += [items[(start + step) % len(items)], *between]
    return tuple(out[: len(out) - len(between)])


def _digits(number: int) -> tuple[str, ...]:
    return tuple(DIGITS[int(digit)] for digit in str(number))


def _sum(first: int, second: int) -> tuple[str, ...]:
    plus, equals = SIGNS
    return (*_digits(first), plus, *_digits(second), equals)


def _pair(first: int, second: int) -> str:
    """The key of a sum, in either order."""
    return f"addition:{min(first, second)}:{max(first, second)}"
