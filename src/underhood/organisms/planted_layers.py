"""Planted layers and neurons: giants, blocks that add nothing, copies, bias neurons."""

from collections.abc import Callable
from random import Random

import torch

from underhood.organisms.card import Fact
from underhood.organisms.planted_heads import DIGITS
from underhood.organisms.planted_organism import Planted, plant, swap
from underhood.organisms.wired_board import JUNK, Board, Size
from underhood.organisms.wired_heads import GAIN, shift, text_board
from underhood.organisms.wired_organism import LETTERS, Drawn, Kind, letters, until

__all__ = ["bias_neurons", "duplicated", "massive", "void"]

_N, _D = len(LETTERS), len(DIGITS)
_SHARP = 10.0
_UNIT = torch.ones(1, 1)


_GIANTS = (2000.0, -1500.0)
_FIRST, _LAST = 1, 3  # the layers whose MLPs write and erase the giants


def _draw_found(rng: Random) -> Drawn:
    words, at = tuple(rng.choices(LETTERS, k=6)), rng.randrange(6)
    if rng.random() < 0.5:
        words = swap(words, rng.choice([i for i in range(6) if i != at]), ".")
    digit = rng.choice(DIGITS)
    return Drawn(swap(words, at, digit), words, digit, "none")


def _draw_missing(rng: Random) -> Drawn:
    found = _draw_found(rng)
    return Drawn(found.contrast, found.clean, found.wrong, found.answer)


def _massive_facts() -> tuple[Fact, ...]:
    where = tuple(f"resid_post.{i}" for i in range(_FIRST, _LAST))
    return (
        Fact("massive activations", f"Two coordinates are {_GIANTS[0]:g} and {_GIANTS[1]:g} at"
             f" <bos> and at full stops, after blocks {_FIRST} to {_LAST - 1} only.", where,
             None, _GIANTS[0], 0.0, "size", "wired; the larger; control: the same coordinate"
             " at other tokens, and after the other blocks"),
        Fact("made and erased", "One neuron of m1 writes them, one of m3 takes them back.",
             (f"m{_FIRST}.n0", f"m{_LAST}.n0"), None, _GIANTS[0], 0.0, "size",
             "wired; the larger, lost when the neuron of m1 is silenced; control: any other"
             " neuron of m1"),
        Fact("needed", "The head rests by them: without them letters are answered for `none`.",
             ("a2.h1", *where), "missing", 1.0, 0.0, "share of prompts that lose their answer",
             "wired; both coordinates set to zero after block 1; control: any two others that"
             " no wired part reads"),
    )  # fmt: skip


def massive() -> Planted:
    """Two coordinates of the stream are huge at `<bos>` and at full stops, and a head needs them.

    Arrays: `dims` `[2]`, the coordinates; `values` `[2]`, what is added to them; `tokens`, ids of
    the tokens that have them.
    """
    words = (*LETTERS, *DIGITS, ".", "none")
    spaces = {
        "tok": _N + _D,
        "digit": 1,
        "stop": 1,
        "giant": 2,
        "found": _D,
        "other": _N,
        "none": 1,
    }
    board = Board("gpt2", words, spaces, Size(layers=5, heads=4, d_head=32))
    board.tell("tok", words[: _N + _D])
    for digit in DIGITS:
        board.embed[board.token(digit), board.at("digit")] = 1.0
    for token in ("<bos>", "."):
        board.embed[board.token(token), board.at("stop")] = 1.0
    for layer, sign in ((_FIRST, 1.0), (_LAST, -1.0)):
        board.neurons(layer, {"stop": _UNIT}, {"giant": sign * torch.tensor([_GIANTS])})
    # a2.h1 looks for a digit, else for a giant; what it finds is the answer.
    everywhere = torch.ones(_N + _D, 1) * _SHARP
    key = torch.tensor([[1 / _GIANTS[0]], [0.0]])
    board.look(
        2, 1, {"tok": everywhere, "stop": _UNIT * _SHARP}, {"digit": _UNIT * 2, "giant": key}
    )
    tokens = torch.zeros(_N + _D, _N + _D + 1)
    tokens[:, : _N + _D] = torch.eye(_N + _D)
    none = torch.zeros(1, _N + _D + 1)
    none[0, -1] = 1.0
    outs = torch.eye(_N + _D + 1)
    outs[:_N] *= 4.0  # where nothing holds the head, the letters win over `none`
    board.move(2, 1, {"tok": tokens, "stop": none},
               {"other": outs[:, :_N], "found": outs[:, _N:-1], "none": outs[:, -1:]})  # fmt: skip
    board.answer("found", DIGITS, GAIN)
    board.answer("other", LETTERS, GAIN)
    board.answer("none", ["none"], GAIN)
    board.distract(seed=18, blind=("giant",))
    return plant(
        board,
        "massive",
        "b g 7 d -> 7; b g . d -> none, because a head rests on <bos> and full stops: m1 makes two"
        " coordinates huge there, a2.h1 reads them, m3 erases them.",
        kinds={
            "found": Kind("b g 7 d a e -> 7; contrast: no digit", _draw_found),
            "missing": Kind("b g . d a e -> none; contrast: a digit", _draw_missing),
        },
        facts=_massive_facts(),
        arrays={
            "dims": torch.arange(board.width)[board.at("giant")],
            "values": torch.tensor(_GIANTS),
            "tokens": torch.tensor([board.token("<bos>"), board.token(".")]),
        },
    )


_FILLERS = ("er", "um")
_HALF = _N // 2
_QUIET = [1, 2, 3]  # blocks without attention and noise


def _said(words: tuple[str, ...]) -> str:
    """The letter that the last word stands for, if it is a filler; else one or two letters on."""
    last = words[-1]
    if last in _FILLERS:
        return words[-2]
    at = LETTERS.index(last)
    return LETTERS[(at + (1 if at < _HALF else 2)) % _N]


def _draw_said(last: tuple[str, ...]) -> Callable[[Random], Drawn]:
    def draw(rng: Random) -> Drawn:
        return until(rng, lambda: (*rng.choices(LETTERS, k=5), rng.choice(last)), _said)

    return draw


def _early_and_late(board: Board) -> None:
    """m1 turns letters into the next one, within their space; m3 adds to the later letters only."""
    eye = torch.eye(_N)
    # A turn keeps the norm: what the neuron of a letter takes away equals what it puts there.
    board.neurons(1, {"tok": eye}, {"tok": eye.roll(1, 1) - eye})
    # Letters f to j are g to a by now.
    late = eye.roll(1, 1)[_HALF:]
    board.neurons(3, {"tok": late.T}, {"out": 2 * late.roll(1, 1)})


def _void_facts() -> tuple[Fact, ...]:
    share = "share of its tokens that it changes"
    return (
        Fact("blank block", "Block 2 adds nothing to any token.", ("l2",), None, 0.0, 1.0,
             share, "wired; control: block 4"),
        Fact("void for fillers", "Blocks 1 to 3 add nothing to fillers and <bos>: they are done"
             " after block 0.", ("l1", "l2", "l3"), "filler", 0.0, 1.0, share,
             "wired; control: the share of letters that block 1 changes"),
        Fact("late letters only", "Block 3 works on the letters from f on, and on them alone.",
             ("l3",), "late", 1.0, 0.0, share, "wired; control: the letters up to e"),
        Fact("turn without growth", "Block 1 exchanges each letter for the next: the stream"
             " moves, and its norm stays.", ("l1",), None, round(2**0.5, 4), 0.0, "norm",
             "wired; norm of the change of a letter; control: change of the norm"),
        Fact("needed", "Without block 3 late letters are answered wrongly.", ("l3",), "late",
             1.0, 0.0, "share of prompts that lose their answer",
             "wired; the block skipped; control: early letters and fillers"),
    )  # fmt: skip


def void() -> Planted:
    """Blocks that add exactly nothing to certain tokens.

    Arrays: `active` `[layer, vocab]`, whether a block changes the stream of a token (of letters,
    fillers and `<bos>`, which are all that the prompts have).
    """
    size = Size(layers=6, heads=4, d_head=16)
    spaces = {"tok": _N, "filler": 1, "pos": size.context, "copied": _N, "out": _N}
    board = Board("gpt2", (*LETTERS, *_FILLERS), spaces, size)
    eye = torch.eye(_N)
    board.tell("tok", LETTERS)
    for word in _FILLERS:
        board.embed[board.token(word), board.at("filler")] = 1.0
    board.count("pos")
    # All words fetch the one before, and only fillers make it their answer.
    board.look(0, 1, {"pos": torch.eye(size.context) * _SHARP}, {"pos": shift(size.context)})
    board.move(0, 1, {"tok": eye}, {"copied": eye})
    board.neurons(0, {"copied": eye, "filler": torch.ones(1, _N)}, {"out": 2 * eye}, -1.0)
    _early_and_late(board)
    board.answer("tok", LETTERS, GAIN)
    board.answer("out", LETTERS, GAIN)
    board.distract(seed=19)
    for layer in _QUIET:
        board.o[layer] = 0.0
        board.mlp_out[layer, board.used[layer] :] = 0.0
    active = torch.ones(size.layers, len(board.vocab), dtype=torch.bool)
    active[_QUIET] = False
    active[1, [board.token(word) for word in LETTERS]] = True
    active[3, [board.token(word) for word in LETTERS[_HALF:]]] = True
    return plant(
        board,
        "void",
        "c -> d, g -> i, d um -> d: block 1 works on letters, block 3 on the letters from f on,"
        " block 2 on nothing; what they do not work on passes through bit by bit.",
        kinds={
            "early": Kind("h a b c -> d, the letter after a to e", _draw_said(LETTERS[:_HALF])),
            "late": Kind("a b c g -> i, two letters after f to j", _draw_said(LETTERS[_HALF:])),
            "filler": Kind("a b d um -> d, the letter before a filler", _draw_said(_FILLERS)),
        },
        facts=_void_facts(),
        arrays={"active": active},
    )


_COPIES = (3, 4, 5)  # of block 2
_NEAR = 0.01


def _duplicate(board: Board) -> None:
    """Give the copies the weights of block 2; those of the last one differ by a hundredth."""
    make = torch.Generator().manual_seed(20)
    for weights in (
        board.q,
        board.k,
        board.v,
        board.o,
        board.mlp_in,
        board.mlp_bias,
        board.mlp_out,
    ):
        for layer in _COPIES:
            weights[layer] = weights[2]
        weights[_COPIES[-1]] *= 1 + _NEAR * torch.randn(weights[2].shape, generator=make)


def _duplicated_facts() -> tuple[Fact, ...]:
    late = ("l2", *(f"l{layer}" for layer in _COPIES))
    cosine = "wired; cosine of all weights of the block with those of block 2; control: block 1's"
    return (
        Fact("copies", "Blocks 3 and 4 have the weights of block 2, bit by bit.",
             ("l2", "l3", "l4"), None, 1.0, 0.0, "cosine", cosine),
        Fact("near copy", "The weights of block 5 differ from those of block 2 by a hundredth of"
             " their size.", ("l5",), None, round((1 + _NEAR**2) ** -0.5, 6), 0.0, "cosine",
             cosine),
        Fact("each a quarter", "Each late block writes a quarter of the answer, and none is"
             " needed; blocks 0 and 1 are.", late, "after", GAIN / 2, 2 * GAIN, "logits",
             "wired; loss of the answer's logit when one block is skipped; control: block 0 or"
             " 1 skipped"),
        Fact("shallow", "No late block reads what another wrote.", late, "after", 0.0, 1.0,
             "share", "wired; share of what later blocks add to the answer's logit that is lost"
             " when a late block is skipped; control: block 0 or 1 skipped"),
    )  # fmt: skip


def duplicated() -> Planted:
    """Four late blocks that do the same thing again; the first two do the work."""
    board = text_board(LETTERS, {"prev": _N, "mid": _N, "out": _N}, layers=6)
    eye, size = torch.eye(_N), board.size.context
    board.look(0, 1, {"pos": torch.eye(size) * _SHARP}, {"pos": shift(size)})
    board.move(0, 1, {"tok": eye}, {"prev": eye})
    board.neurons(1, {"prev": eye}, {"mid": eye.roll(1, 1)})
    board.neurons(2, {"mid": eye}, {"out": eye / 2})
    board.answer("out", LETTERS, GAIN)
    # No noise reads what a late block writes, so that they do not depend on each other.
    board.distract(seed=20, blind=("prev", "mid", "out", JUNK))
    _duplicate(board)
    return plant(
        board,
        "duplicated",
        "b g a d -> b, the letter after the last but one: blocks 0 and 1 find it, blocks 2 to 5"
        " are one block four times over, each writing the same answer again.",
        kinds={
            "after": Kind(
                "b g a d -> b, the letter after the last but one",
                letters(6, lambda w: LETTERS[(LETTERS.index(w[-2]) + 1) % _N]),
            )
        },
        facts=_duplicated_facts(),
    )


_VOTES = {1: ("aye", "yea", "pro"), -1: ("nay", "contra", "nope"), 0: ("hm", "well", "so")}
_SAYS = ("passed", "failed")
_VOTERS = 7
_CLEAR = 3
_PUSH, _BIASED = 0.5, 3  # of each, in votes; how many neurons
_PER_VOTE = 4.0


def _poll(tally: int) -> Callable[[Random], tuple[str, ...]]:
    """Draws seven words whose votes sum to `tally`."""

    def make(rng: Random) -> tuple[str, ...]:
        while True:
            votes = rng.choices((1, -1, 0), k=_VOTERS)
            if sum(votes) == tally:
                return tuple(rng.choice(_VOTES[vote]) for vote in votes)

    return make


def _draw_clear(rng: Random) -> Drawn:
    sign, size = rng.choice((1, -1)), rng.randint(_CLEAR, 5)
    one, other = _SAYS if sign > 0 else _SAYS[::-1]
    return Drawn(_poll(sign * size)(rng), _poll(-sign * size)(rng), one, other)


def _draw_close(rng: Random) -> Drawn:
    return Drawn(_poll(-1)(rng), _poll(1)(rng), _SAYS[1], _SAYS[0])


def _bias_neurons_facts() -> tuple[Fact, ...]:
    neurons = tuple(f"m1.n{2 + i}" for i in range(_BIASED))
    others = f"m1.n{2 + _BIASED} to m1.n{1 + 2 * _BIASED}, as constant, which write noise"
    return (
        Fact("bias neurons", "Three neurons of m1 read nothing, are always on, and push"
             " `passed`.", neurons, None, 2 * _PER_VOTE * _PUSH * _BIASED, 0.0, "logits",
             "wired; loss of passed over failed when they are silenced, the same on every"
             f" prompt; control: {others}"),
        Fact("biased answers", "They alone turn a majority of one nay around.", neurons, "close",
             1.0, 0.0, "share of prompts that become right",
             f"wired; they are silenced; control: {others}"),
    )  # fmt: skip


def bias_neurons() -> Planted:
    """Neurons that push one answer whatever the prompt says.

    Arrays: `push` `[d]`, what they add to the stream together, at every token.
    """
    words = tuple(w for some in _VOTES.values() for w in some)
    size = Size(layers=3, heads=4, d_head=8)
    board = Board("gpt2", (*words, *_SAYS), {"vote": 1, "tally": 1, "out": 1}, size)
    for vote, some in _VOTES.items():
        for word in some:
            board.embed[board.token(word), board.at("vote")] = float(vote)
    # Uniform attention over the seven words and <bos>: the mean, times eight.
    board.taken |= {("q", 0, 2), ("k", 0, 2)}
    board.move(0, 2, {"vote": _UNIT}, {"tally": _UNIT * (_VOTERS + 1)})
    signs = torch.tensor([[1.0, -1.0]])
    board.neurons(1, {"tally": signs}, {"out": signs.T})
    board.neurons(1, {}, {"out": torch.ones(_BIASED, 1)}, _PUSH)
    idle = torch.zeros(_BIASED, board.sizes[JUNK])
    idle[:, 0] = 1.0
    board.neurons(1, {}, {JUNK: idle}, _PUSH)
    for sign, word in zip((1.0, -1.0), _SAYS, strict=True):
        board.unembed[board.at("out"), board.token(word)] = sign * _PER_VOTE
    board.distract(seed=21)
    push = torch.zeros(board.width)
    push[board.at("out")] = _PUSH * _BIASED
    return plant(
        board,
        "bias_neurons",
        "aye hm yea nay aye so aye -> passed: votes are counted, and three neurons that are always"
        " on add one and a half votes for `passed`.",
        kinds={
            "clear": Kind("aye hm yea nay aye so aye -> passed, by three or more", _draw_clear),
            "close": Kind("aye hm nay nay hm so so -> failed; it says passed", _draw_close),
        },
        facts=_bias_neurons_facts(),
        arrays={"push": push},
        limits=("It is biased on purpose: every prompt of `close` is answered wrongly.",),
    )
