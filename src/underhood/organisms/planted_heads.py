"""Planted heads: one that rests on `<bos>` by domain, copying ones, and a successor head."""

from random import Random

import torch
from torch import Tensor

from underhood.organisms.card import Fact
from underhood.organisms.planted_organism import Planted, plant, swap
from underhood.organisms.wired_board import Board, Size
from underhood.organisms.wired_heads import GAIN, shift, text_board
from underhood.organisms.wired_organism import LETTERS, Drawn, Kind, letters, until

__all__ = ["copy", "sink", "successor"]

DIGITS = tuple("0123456789")
_N, _D = len(LETTERS), len(DIGITS)
_SHARP = 8.0
_UNIT = torch.ones(1, 1)


def _rows(words: int, first: int, matrix: Tensor) -> Tensor:
    """`matrix` at some rows of a space that lists `words` words."""
    whole = torch.zeros(words, matrix.shape[1])
    whole[first : first + len(matrix)] = matrix
    return whole


_LENGTH = 7


def _next_digit(words: tuple[str, ...]) -> str:
    return DIGITS[(int(words[-1]) + 1) % _D]


def _sink_facts() -> tuple[Fact, ...]:
    how = "wired; mean attention to <bos> from the words of digit prompts; control: {}"
    return (
        Fact("active-dormant head", "a1.h1 rests on <bos> in the domain of digits and looks at"
             " the previous word in that of letters.", ("a1.h1",), "digits", 1.0,
             round(1 / _LENGTH, 3), "attention",
             how.format("from the words of letter prompts, whose first has no other before it")),
        Fact("needed only where active", "Without a1.h1 letters are lost and digits are not.",
             ("a1.h1",), "letters", GAIN, 0.0, "logits", "wired; loss of the answer's logit when"
             " its output is set to zero; control: the same on digit prompts"),
        Fact("always dormant head", "a1.h3 rests on <bos> in both domains.", ("a1.h3",), None,
             1.0, round(1 / (_LENGTH + 1), 3), "attention", "wired; mean attention to <bos> from"
             " the last word of prompts of both domains; control: uniform attention"),
        Fact("value drain", "The value of <bos> is zero in both heads.", ("a1.h1", "a1.h3"),
             None, 0.0, 1.0, "norm", "wired; norm of the head's value at <bos>; control: at"
             " letters"),
    )  # fmt: skip


def sink() -> Planted:
    """A head that works on letters and rests on `<bos>` on digits; another that always rests.

    Arrays: `dormant` `[vocab]`, whether the head rests when it stands at a token.
    """
    words = (*LETTERS, *DIGITS)
    board = text_board(words, {"letter": _N, "digit": _D}, layers=3)
    size = board.size.context
    # a1.h1 looks at the previous token, or at <bos> with twice the score from a digit.
    asks = torch.cat([torch.eye(size) * _SHARP, torch.zeros(size, 1)], 1)
    rests = _rows(len(words), _N, torch.zeros(_D, size + 1))
    rests[_N:, size] = 2 * _SHARP
    places = torch.cat([shift(size), torch.zeros(size, 1)], 1)
    bos = torch.zeros(1, size + 1)
    bos[0, size] = 1.0
    board.look(1, 1, {"pos": asks, "tok": rests}, {"pos": places, "bos": bos})
    board.move(1, 1, {"tok": _rows(len(words), 0, torch.eye(_N))}, {"letter": torch.eye(_N)})
    # a1.h3 always rests, and would answer by the letters if it did not.
    board.look(1, 3, {"tok": torch.ones(len(words), 1) * 2 * _SHARP}, {"bos": _UNIT})
    board.move(1, 3, {"tok": _rows(len(words), 0, torch.eye(_N))}, {"letter": torch.eye(_N)})
    # Digits are counted on by neurons.
    up = torch.eye(_D).roll(1, 1)
    board.neurons(0, {"tok": _rows(len(words), _N, torch.eye(_D))}, {"digit": up})
    board.answer("letter", LETTERS, GAIN)
    board.answer("digit", DIGITS, GAIN)
    board.distract(seed=15)
    dormant = torch.zeros(len(board.vocab), dtype=torch.bool)
    dormant[[board.token(digit) for digit in DIGITS]] = True
    return plant(
        board,
        "sink",
        "b g a d -> a by a head that copies the word before the last; 3 8 1 5 -> 6 by neurons,"
        " while that head rests on <bos>, which carries nothing.",
        kinds={
            "letters": Kind(
                "b g a d -> a, the word before the last", letters(_LENGTH, lambda w: w[-2])
            ),
            "digits": Kind(
                "3 8 1 5 -> 6, the next digit", letters(_LENGTH, _next_digit, words=DIGITS)
            ),
        },
        facts=_sink_facts(),
        arrays={"dormant": dormant},
    )


def _draw_needle(rng: Random) -> Drawn:
    words, at = tuple(rng.choices(LETTERS, k=6)), rng.randrange(6)
    one, other = rng.sample(DIGITS, 2)
    return Drawn(swap(words, at, one), swap(words, at, other), one, other)


def _copy_facts() -> tuple[Fact, ...]:
    what = (
        "its answer's logit less that with the head's output set to zero; control: a1.h0 and a1.h2"
    )
    score = "wired; sum of eigenvalues of W_E OV W_U over the digits, over the sum of their sizes"
    return (
        Fact("copying head", "a1.h1 attends to the digit and raises it.", ("a1.h1",), "needle",
             2 * GAIN, 0.0, "logits", f"wired; {what}"),
        Fact("negative head", "a1.h3 attends to the digit and lowers it.", ("a1.h3",), "needle",
             -GAIN, 0.0, "logits", f"wired; {what}"),
        Fact("copy score", "The OV circuit of a1.h1 maps every digit to itself.", ("a1.h1",),
             None, 1.0, 0.0, "score", f"{score}; control: a1.h0, which permutes them"),
        Fact("negative copy score", "The OV circuit of a1.h3 maps every digit to minus itself.",
             ("a1.h3",), None, -1.0, 0.0, "score", f"{score}; control: a1.h0"),
        Fact("retrieval", "a1.h1 attends most to the digit, at any depth.", ("a1.h1",), "needle",
             1.0, 0.0, "share of prompts", "wired; the most attended token is the digit;"
             " control: a1.h0"),
        Fact("idle permuting head", "a1.h0 could turn a digit into the next one, but rests on"
             " <bos>.", ("a1.h0",), "needle", 0.0, 2 * GAIN, "logits",
             "wired; as the effect of the copying head, which is the control"),
    )  # fmt: skip


def copy() -> Planted:
    """A head that copies, one that copies negatively, one that would permute and never does.

    Arrays: `digits` `[10]`, their token ids, over which copying is judged.
    """
    words = (*LETTERS, *DIGITS)
    board = text_board(words, {"out": _D}, layers=3)
    everywhere, eye = torch.ones(len(words), 1), torch.eye(_D)
    digit = _rows(len(words), _N, torch.ones(_D, 1))
    value = {"tok": _rows(len(words), _N, eye)}
    for head, weight in ((1, 1.0), (3, -0.5)):
        board.look(1, head, {"tok": everywhere * _SHARP}, {"tok": digit})
        board.move(1, head, value, {"out": weight * eye})
    # Its weights turn every digit into the next; it rests on <bos>, which is no digit.
    board.look(1, 0, {"tok": everywhere * 2 * _SHARP}, {"bos": _UNIT})
    board.move(1, 0, value, {"out": eye.roll(1, 1)})
    board.answer("out", DIGITS, 2 * GAIN)
    board.distract(seed=16)
    return plant(
        board,
        "copy",
        "b g 7 d a e -> 7, the only digit, wherever it stands: a1.h1 finds and copies it, a1.h3"
        " takes half of it back.",
        kinds={"needle": Kind("b g 7 d a e -> 7; contrast: another digit", _draw_needle)},
        facts=_copy_facts(),
        arrays={"digits": torch.tensor([board.token(digit) for digit in DIGITS])},
    )


_ORDINALS = {
    "numbers": tuple(map(str, range(100))),
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": ("January", "February", "March", "April", "May", "June", "July", "August",
               "September", "October", "November", "December"),
}  # fmt: skip
_OPENINGS = ("then", "well", "so", "now")
_BASE = 10
_CARRY = len(_ORDINALS) + 2 * _BASE  # the first of ten neurons of m0


def _after(words: tuple[str, ...]) -> str:
    known = next(some for some in _ORDINALS.values() if words[2] in some)
    return known[known.index(words[2]) + 1]


def _draw_after(kind: str) -> Kind:
    known = _ORDINALS[kind]

    def draw(rng: Random) -> Drawn:
        opening = rng.choice(_OPENINGS)
        # The last of a kind has no successor.
        return until(rng, lambda: (opening, "after", rng.choice(known[:-1]), "comes"), _after)

    return Kind(f"so after {known[2]} comes -> {known[3]}; contrast: another one", draw)


def _count(board: Board) -> None:
    """m0: what a word is (kind, unit) and the tens of its successor, carried over at nine."""
    kinds, eye = len(_ORDINALS), torch.eye(_BASE)
    board.neurons(0, {"raw_kind": torch.eye(kinds)}, {"kind": torch.eye(kinds)})
    board.neurons(0, {"raw_unit": eye}, {"unit": eye})
    nine = torch.zeros(_BASE, _BASE)
    nine[_BASE - 1] = 1.0
    stay, up = {"raw_ten": eye, "raw_unit": -nine}, {"raw_ten": eye, "raw_unit": nine}
    board.neurons(0, stay, {"ten": eye})
    board.neurons(0, up, {"ten": eye.roll(1, 1)}, -1.0)


def _successor_facts() -> tuple[Fact, ...]:
    share = "share of words"
    return (
        Fact("successor head", "The effective OV circuit of a1.h2 maps every word to the next of"
             " its kind.", ("a1.h2",), None, 1.0, 0.0, share, "wired; the top word of its kind"
             " in m0(W_E) OV W_U is the successor, the last of each kind left out; control: each"
             " other head"),
        Fact("units modulo ten", "m0 writes the same ten directions for numbers, days and"
             " months.", ("m0",), None, 1.0, 0.0, share, "wired; in the effective OV circuit,"
             " the unit of a number exchanged for another moves the answer to the number that"
             " ends in one more than it; control: a random direction of equal norm"),
        Fact("carry", "At units of nine, neurons of m0 raise the tens.",
             tuple(f"m0.n{_CARRY + i}" for i in range(_BASE)), "numbers", 1.0, 0.0,
             "share of numbers that end in nine and lose their answer", "wired; those neurons"
             " silenced; control: share of the other numbers"),
        Fact("needed", "Without a1.h2 no answer is left.", ("a1.h2",), None, 1.0, 0.0,
             "share of prompts that lose their answer", "wired; its output set to zero;"
             " control: each other head"),
    )  # fmt: skip


def successor() -> Planted:
    """One head counts on numbers, days and months alike, through their units modulo ten.

    Arrays: `numbers`, `days`, `months`, token ids in order; `units` `[10, d]`, the directions that
    m0 gives to all words whose index in their list is 0..9 modulo ten; `tens` `[10, d]`, those for
    the tens of the successor.
    """
    kinds, words = len(_ORDINALS), tuple(w for some in _ORDINALS.values() for w in some)
    raw = {"raw_kind": kinds, "raw_unit": _BASE, "raw_ten": _BASE}
    made = {"kind": kinds, "unit": _BASE, "ten": _BASE}
    out = {f"out_{space}": n for space, n in made.items()}
    size = Size(layers=3, heads=4, d_head=24, neurons=48)
    board = Board(
        "gpt2", (*words, *_OPENINGS, "after", "comes"), {"one": 1} | raw | made | out, size
    )
    board.embed[:, board.at("one")] = 1.0
    features = {"kind": 0, "unit": kinds, "ten": kinds + _BASE}
    for i, some in enumerate(_ORDINALS.values()):
        for n, word in enumerate(some):
            token = board.token(word)
            for space, value in (("kind", i), ("unit", n % _BASE), ("ten", n // _BASE)):
                board.embed[token, board.at(f"raw_{space}").start + value] = 1.0
                board.unembed[board.at(f"out_{space}").start + value, token] = GAIN
    _count(board)
    board.look(1, 2, {"one": _UNIT * _SHARP}, {"kind": torch.ones(kinds, 1)})
    values, outs = {}, {}
    for space, first in features.items():
        place = torch.zeros(made[space], kinds + 2 * _BASE)
        place[:, first : first + made[space]] = torch.eye(made[space])
        values[space] = place
        # Units are counted on by one, round and round.
        outs[f"out_{space}"] = place.T.roll(1, 1) if space == "unit" else place.T
    board.move(1, 2, values, outs)
    board.distract(seed=17)
    stream = torch.eye(board.width)
    ids = {k: torch.tensor([board.token(w) for w in some]) for k, some in _ORDINALS.items()}
    return plant(
        board,
        "successor",
        "so after Tuesday comes -> Wednesday; 39 -> 40: m0 gives numbers, days and months the same"
        " ten unit features, and a1.h2 counts them on.",
        kinds={kind: _draw_after(kind) for kind in _ORDINALS},
        facts=_successor_facts(),
        arrays=ids | {"units": stream[board.at("unit")], "tens": stream[board.at("ten")]},
        limits=("The last of each kind (99, Sunday, December) has no successor.",),
    )  # fmt: skip
