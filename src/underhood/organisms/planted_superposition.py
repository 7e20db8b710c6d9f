"""Planted superposition: 128 sparse features in 64 dimensions, with known dictionary and codes.

The dictionary is two orthonormal bases, every vector of one at a cosine of exactly +-1/8 to every
vector of the other. All entries are multiples of 1/64, so cosines are exact in float32.
"""

from random import Random

import torch

from underhood.organisms.card import Fact
from underhood.organisms.planted_organism import Planted, hadamard, plant
from underhood.organisms.wired_board import Board, Size
from underhood.organisms.wired_organism import Drawn, Kind

__all__ = ["superposition"]

_DIMS, _FEATURES = 64, 128
_WORDS = tuple(f"w{i}" for i in range(_FEATURES))
_READ = 5  # words of a prompt
_COUNT = 2.0  # what each word adds to its feature at the last word
# Between what the word said three times makes of its detector (5.375 at least) and what any other
# does (4 at most), whatever the interference.
_BAR = 4.5
_BOOST, _GAIN = 4.0, 2.0


def _draw(rng: Random) -> Drawn:
    one, other, *rest = rng.sample(_WORDS, 4)
    places = rng.sample(range(_READ), 3)

    def said(word: str) -> tuple[str, ...]:
        left = iter(rest)
        return tuple(word if i in places else next(left) for i in range(_READ))

    return Drawn(said(one), said(other), one, other)


def _superposition_facts() -> tuple[Fact, ...]:
    least = ((_FEATURES - _DIMS) / (_DIMS * (_FEATURES - 1))) ** 0.5
    return (
        Fact("superposition", "128 unit vectors in 64 dimensions; the largest cosine between two"
             " of them is 1/8.", ("resid_pre.0", "attn_out.0"), None, 0.125, round(least, 4),
             "cosine", "wired; control: the Welch bound, the least that any 128 vectors in 64"
             " dimensions can have"),
        Fact("sparse codes", "attn_out.0 is a sum of the features of the words so far, three at"
             " the last word; up to four features, no other code is as sparse.",
             ("attn_out.0",), "thrice", 1.0, 0.0, "share of prompts whose code is found",
             "wired; orthogonal matching pursuit of three steps; control: a dictionary of random"
             " unit vectors"),
        Fact("detectors", "Neuron f of m1 reads feature f and writes it: at the last word only"
             " that of the word said three times fires.", ("m1",), "thrice", 1.0, 0.0,
             "share of prompts", "wired; it fires; control: any other detector fires"),
    )  # fmt: skip


def superposition() -> Planted:
    """Each word has a feature of its own, and there are twice as many as dimensions.

    Arrays: `dictionary` `[feature, d]`, unit vectors; `code` `[vocab, feature]`, the feature of
    each token (zeros for the special ones). With `c = code[ids]`, the code of attn_out.0 at
    position p (`<bos>` is 0) is `12 / (p + 1) * c.cumsum(-2)`, and at resid_pre.0 it is `c`.
    """
    first = hadamard(_DIMS, seed=3)
    dictionary = torch.cat([first, hadamard(_DIMS, seed=4) @ first])
    heads = 4
    size = Size(layers=3, heads=heads, d_head=20, neurons=_FEATURES + 16)
    board = Board("gpt2", _WORDS, {"code": _DIMS}, size)
    place = board.at("code")
    start = board.token(_WORDS[0])
    board.embed[start:, place] = dictionary
    # Uniform attention: each head moves a quarter of the coordinates of all words so far.
    part = _DIMS // heads
    for head, rows in enumerate(torch.eye(_DIMS).split(part)):
        board.move(0, head, {"code": rows.T}, {"code": rows * _COUNT * (_READ + 1)})
        board.taken |= {("q", 0, head), ("k", 0, head)}
    board.neurons(1, {"code": dictionary.T}, {"code": _BOOST * dictionary}, -_BAR)
    board.unembed[place, start:] = _GAIN * dictionary.T
    board.distract(seed=14)
    code = torch.cat([torch.zeros(start, _FEATURES), torch.eye(_FEATURES)])
    wide = torch.zeros(_FEATURES, board.width)
    wide[:, place] = dictionary
    return plant(
        board,
        "superposition",
        "w7 w3 w7 w90 w7 -> w7, the word said three times: 128 words are 128 features in 64"
        " dimensions, summed by attention and told apart by one neuron each.",
        kinds={"thrice": Kind("w7 w3 w7 w90 w7 -> w7; contrast: another word thrice", _draw)},
        facts=_superposition_facts(),
        arrays={"dictionary": wide, "code": code},
    )  # fmt: skip
