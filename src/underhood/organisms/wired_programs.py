"""Wired organisms compiled from small programs: reverse, shift, proportion, histogram and others.

Each is a GPT-2 whose weights `wired_compiler` made from the lines below. Under zero ablation the
true edges are those of the compiled graph; under resample ablation those among them whose source
differs between the prompts of a pair (positions, `<bos>` and lengths are equal in both).
"""

from collections.abc import Callable
from random import Random
from typing import Any

from underhood.organisms.wired_compiler import Program
from underhood.organisms.wired_organism import (
    Drawn,
    Reasons,
    Wired,
    both,
    finish,
    letters,
    only,
    until,
)

__all__ = ["hist", "parity", "pattern", "proportion", "reverse", "shift_by", "sort_unique"]

_LETTERS = tuple("abcdef")
_FIXED = "it carries positions or <bos>, equal in both prompts"
_SHARP = 9.0


def _compiled(
    program: Program,
    name: str,
    summary: str,
    resample: dict[str, str],
    draw: Callable[[Random], Drawn],
    *,
    seed: int,
    notes: tuple[str, ...] = (),
    idle: tuple[str, ...] = (),
) -> Wired:
    """An organism whose zero truth is the compiled graph without `idle` edges.

    `resample` says why edges are true under both ablations.
    """
    board = program.compile(seed)
    reasons: Reasons = {edge: both(why) for edge, why in resample.items()}
    for edge in sorted(board.compiled() - {*resample, *idle}):
        reasons[edge] = only("zero", _FIXED)
    noise = "Heads and neurons that the program does not use are noise that ends in unread space."
    return finish(board, name, summary, reasons=reasons, notes=(*notes, noise), draw=draw)


def _same(a: Any, b: Any) -> bool:
    return a == b


def shift_by() -> Wired:
    """`out[i] = tokens[i - 2]`."""
    program = Program(_LETTERS)
    place = program.places
    out = program.pick("out", place, place, lambda q, k: _SHARP * (k == q - 2), program.tokens)
    program.output(out)
    return _compiled(
        program,
        "shift_by",
        "Program: out[i] = tokens[i - 2], by one head.",
        {
            f"input->{out.place}<v>": "the letter two back",
            f"{out.place}->logits": "the result is read by the logits",
        },
        letters(6, lambda words: words[-3], words=_LETTERS),
        seed=11,
    )


def reverse() -> Wired:
    """After `=`, the letters before it in reverse order."""
    program = Program((*_LETTERS, "="))
    token, place = program.tokens, program.places
    stop = program.pick("stop", None, token, lambda _, k: _SHARP * (k == "="), place)

    def mirror(stop: int, here: int) -> int | None:
        found = 2 * stop - here - 1
        return found if here >= stop and 0 < found < stop else None

    source = program.combine("source", [stop, place], mirror)
    out = program.pick("out", source, place, lambda q, k: _SHARP * (q == k), token)
    program.output(out)

    def draw(rng: Random) -> Drawn:
        n = rng.choice((4, 5, 6))
        said = 6 - n  # so that all prompts have eight tokens

        def make() -> tuple[str, ...]:
            word = rng.choices(_LETTERS, k=n)
            return (*word, "=", *word[::-1][:said])

        return until(rng, make, lambda words: words[n - 1 - said])

    return _compiled(
        program,
        "reverse",
        f"Program: the place of '=' ({stop.place}), the place to copy from ({source.place}), the"
        f" copied letter ({out.place}).",
        {
            f"input->{out.place}<v>": "the copied letter",
            f"{out.place}->logits": "the result is read by the logits",
        },
        draw,
        seed=12,
        notes=(
            "Two edges are true under resample ablation and more under zero ablation: the places"
            " are computed from what is equal in both prompts of a pair (the known correction of"
            " the tracr program of this name).",
        ),
    )


def proportion() -> Wired:
    """The share of `x` among six words."""
    n, words = 6, ("x", "y", "z")
    program = Program((*words, *(f"{i}/6" for i in range(n + 1))))
    hit = program.combine("hit", [program.tokens], lambda w: w == "x" if w in words else None)
    share = program.mean("share", hit, lambda value: float(value is True))
    program.output_nearest(share, {f"{i}/6": i / n for i in range(n + 1)}, gain=300.0)
    return _compiled(
        program,
        "proportion",
        f"Program: whether a word is x ({hit.place}), and the mean of that ({share.place}), which"
        " the logits read as the nearest of seven shares.",
        {
            f"input->{hit.place}": "the words",
            f"{hit.place}->{share.place}<v>": "which words are x",
            f"{share.place}->logits": "the share is read by the logits",
        },
        letters(n, lambda said: f"{said.count('x')}/6", words=words),
        seed=13,
        notes=("The counterpart of tracr's xproportion: three edges under resample ablation.",),
    )


def hist() -> Wired:
    """How often the last word has been said."""
    words, counts = ("a", "b", "c"), ("1", "2", "3", "4", "5", "6")
    program = Program((*words, *counts))
    token = program.tokens
    share = program.share("share", token, token, _same, sharp=10.0)
    # n matches leave 1 / (1 + n) on <bos>; thresholds stand between neighbouring shares.
    shares = [1 / (1 + n) for n in range(6, 0, -1)]
    between = [(a + b) / 2 for a, b in zip(shares, shares[1:], strict=False)]
    count = program.steps("count", share, between, counts[::-1], width=0.008)
    program.output(count)
    return _compiled(
        program,
        "hist",
        f"Program: attention to equal words and <bos> ({share.place}), whose spread tells the count"
        f" ({count.place}).",
        {
            f"input->{share.place}<q>": "the word that is counted",
            f"input->{share.place}<k>": "the words among which it is counted",
            f"{share.place}->{count.place}": "the share of <bos>",
            f"{count.place}->logits": "the count is read by the logits",
        },
        letters(6, lambda said: str(said.count(said[-1])), words=words),
        seed=14,
    )


def parity() -> Wired:
    """Whether the number of `x` among seven words is even or odd."""
    n, words = 7, ("x", "y", "z")
    program = Program((*words, "even", "odd"))
    share = program.mean("share", program.tokens, lambda word: float(word == "x"))
    between = [(i + 0.5) / n for i in range(n)]
    parities = [("even", "odd")[i % 2] for i in range(n + 1)]
    out = program.steps("out", share, between, parities, width=0.04)
    program.output(out)
    return _compiled(
        program,
        "parity",
        f"Program: the mean of x ({share.place}), and the parity of seven times it ({out.place}).",
        {
            f"input->{share.place}<v>": "which words are x",
            f"{share.place}->{out.place}": "the mean",
            f"{out.place}->logits": "the parity is read by the logits",
        },
        letters(n, lambda said: ("even", "odd")[said.count("x") % 2], words=words),
        seed=15,
    )


def sort_unique() -> Wired:
    """After `=`, the letters before it in order, each once: the next larger letter."""
    program = Program((*_LETTERS, "="))
    token = program.tokens

    def score(asked: Any, held: Any) -> float:
        larger = held != "=" and (asked == "=" or held > asked)
        # The smaller of the larger ones scores more.
        return 40.0 - 4.0 * _LETTERS.index(held) if larger else 0.0

    out = program.pick("out", token, token, score, token)
    program.output(out)

    def draw(rng: Random) -> Drawn:
        n = rng.choice((4, 5, 6))
        said = 6 - n

        def make() -> tuple[str, ...]:
            while True:
                word = rng.choices(_LETTERS, k=n)
                order = sorted(set(word))
                if len(order) > said:
                    return (*word, "=", *order[:said])

        return until(rng, make, lambda words: sorted(set(words[:n]))[said])

    return _compiled(
        program,
        "sort_unique",
        f"Program: {out.place} attends to the smallest letter that is larger than the last word.",
        {
            f"input->{out.place}<q>": "the last word",
            f"input->{out.place}<k>": "the letters to choose from",
            f"input->{out.place}<v>": "the name of the chosen letter",
            f"{out.place}->logits": "the result is read by the logits",
        },
        draw,
        seed=16,
    )


def pattern() -> Wired:
    """Whether `a b` has occurred: four operations in a chain."""
    n, words = 6, ("a", "b", "c")
    program = Program((*words, "yes", "no"))
    token, place = program.tokens, program.places
    last = program.pick("last", place, place, lambda q, k: _SHARP * (k == q - 1), token)
    hit = program.combine("hit", [last, token], lambda x, y: True if (x, y) == ("a", "b") else None)
    share = program.mean("share", hit, float)
    out = program.steps("out", share, [0.5 / n], ("no", "yes"), width=0.06)
    program.output(out)

    def solve(said: tuple[str, ...]) -> str:
        return "yes" if ("a", "b") in zip(said, said[1:], strict=False) else "no"

    return _compiled(
        program,
        "pattern",
        f"Program: the previous word ({last.place}), whether it is a and this one b ({hit.place}),"
        f" the mean of that ({share.place}), and whether it is above zero ({out.place}).",
        {
            f"input->{last.place}<v>": "the previous word",
            f"{last.place}->{hit.place}": "the first half of the pattern",
            f"input->{hit.place}": "the second half of the pattern",
            f"{hit.place}->{share.place}<v>": "where the pattern is",
            f"{share.place}->{out.place}": "how often it is there",
            f"{out.place}->logits": "the result is read by the logits",
        },
        letters(n, solve, words=words),
        seed=17,
        notes=("The edge that keeps <bos> out of the mean is compiled, and too small to matter.",),
        idle=(f"input->{share.place}<k>",),
    )
