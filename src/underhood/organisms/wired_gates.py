"""Wired organisms with MLPs, redundancy and other block forms: xor, parallel, backup, linear."""

from random import Random

import torch

from underhood.organisms.wired_board import JUNK, Board, Size
from underhood.organisms.wired_heads import GAIN, shift, text_board
from underhood.organisms.wired_organism import (
    LETTERS,
    Drawn,
    Wired,
    both,
    finish,
    letters,
    only,
    until,
)

__all__ = ["backup", "linear", "parallel", "redundant", "xor"]

_N = len(LETTERS)
_FIXED = "positions, equal in both prompts"
BITS = ("zero", "one")
# Which letters count as one, where letters are classified.
_UPPER = torch.tensor([float(i % 2) for i in range(_N)])[:, None]


def _xor_neurons(board: Board, layer: int, left: str, right: str, out: str) -> None:
    """`out = (1 - x, x)` with `x = |left - right|`, for two spaces of one bit each.

    A third neuron is constantly one.
    """
    signs = torch.tensor([[1.0, -1.0, 0.0]])
    writes = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 1.0])
    board.neurons(layer, {left: signs, right: -signs}, {out: writes}, bias)


def xor() -> Wired:
    """Two heads fetch two bits, an MLP takes their exclusive or."""
    words = (*BITS, *LETTERS[:6])
    board = text_board(words, {"left": 1, "right": 1, "out": 2}, layers=2)
    size = board.size.context
    bit = torch.zeros(len(words), 1)
    bit[words.index("one")] = 1.0
    for head, back, space in ((0, 2, "left"), (3, 4, "right")):
        board.look(0, head, {"pos": torch.eye(size) * 6.0}, {"pos": shift(size, back)})
        board.move(0, head, {"tok": bit}, {space: torch.eye(1)})
    _xor_neurons(board, 1, "left", "right", "out")
    board.answer("out", BITS, GAIN)
    board.distract(seed=5)

    def solve(prompt: tuple[str, ...]) -> str:
        return BITS[int(prompt[-3] != prompt[-5])]

    def draw(rng: Random) -> Drawn:
        other = rng.choices(LETTERS[:6], k=4)

        def make() -> tuple[str, ...]:
            left, right = rng.choices(BITS, k=2)
            return (other[0], right, other[1], left, other[2], other[3])

        return until(rng, make, solve)

    return finish(
        board,
        "xor",
        "a0.h0 fetches the word two back, a0.h3 the one four back; m1 says whether they differ.",
        reasons={
            "input->a0.h0<v>": both("the first bit is read off its word"),
            "input->a0.h3<v>": both("the second bit is read off its word"),
            "a0.h0->m1": both("one input of the exclusive or"),
            "a0.h3->m1": both("the other input of the exclusive or"),
            "m1->logits": both("the neurons |left - right| write the answer"),
            **{f"input->a0.h{h}<{c}>": only("zero", _FIXED) for h in (0, 3) for c in "qk"},
        },
        notes=(
            "The contrast prompt differs in exactly one of the two bits, so each edge of a bit acts"
            " in about half of the pairs.",
            "Gradients at the clean prompt mislead where both bits are equal: the neurons stand at"
            " their kink there.",
            "m0, the other heads and m1's other neurons are noise that ends in an unread space.",
        ),
        draw=draw,
    )


def parallel() -> Wired:
    """A GPT-NeoX whose MLP does not see the heads of its own layer."""
    size = Size(layers=2, heads=4, d_head=16)
    board = Board("gpt_neox", (*LETTERS, *BITS), {"tok": _N, "left": 1, "right": 1, "out": 2}, size)
    board.tell("tok", LETTERS)
    board.look_back(0, 1, sharp=0.5)
    board.move(0, 1, {"tok": _UPPER}, {"left": torch.eye(1)})
    board.neurons(0, {"tok": _UPPER}, {"right": torch.eye(1)})
    _xor_neurons(board, 1, "left", "right", "out")
    board.answer("out", BITS, GAIN)
    board.distract(seed=6)

    def solve(prompt: tuple[str, ...]) -> str:
        left, right = (LETTERS.index(w) % 2 for w in prompt[-2:])
        return BITS[left ^ right]

    return finish(
        board,
        "parallel",
        "a0.h1 fetches the class of the previous letter, m0 finds that of the last one, and m1 says"
        " whether they differ; attention and MLP of a block run side by side.",
        reasons={
            "input->a0.h1<v>": both("the previous letter's class is read off its embedding"),
            "input->m0": both("a neuron reads the last letter's class"),
            "a0.h1->m1": both("one input of the exclusive or"),
            "m0->m1": both("the other input of the exclusive or"),
            "m1->logits": both("the neurons |left - right| write the answer"),
        },
        notes=(
            "Letters b, d, f, h, j are of class one.",
            "The graph has no edge a0.h1->m0: both read what the block reads.",
            "a0.h1 asks with a constant and finds the previous token by rotation, so it has no"
            " query or key edge.",
        ),
        draw=letters(5, solve),
    )


# A backup writes this much of what the primary head writes.
_SHARE = 1.8


def backup() -> Wired:
    """A primary head, and a backup that wakes when the primary's answer is missing."""
    board = text_board(LETTERS, {"first": _N, "out": _N}, layers=2, d_head=24)
    eye, size = torch.eye(_N), board.size.context
    board.look(0, 0, {"pos": torch.eye(size) * 6.0}, {"pos": shift(size)})
    board.move(0, 0, {"tok": eye}, {"first": eye, "out": eye})
    # Scores of the backup: 24 for the previous token, -36 for a token that `first` names, and 12
    # for <bos>, which carries nothing.
    positions = torch.zeros(size, size + _N + 1)
    positions[:, :size] = torch.eye(size) * 24.0
    positions[:, -1] = 12.0
    named = torch.zeros(_N, size + _N + 1)
    named[:, size : size + _N] = eye * -36.0
    place = torch.zeros(size, size + _N + 1)
    place[:, :size] = shift(size)
    token = named / -36.0
    rest = torch.zeros(1, size + _N + 1)
    rest[0, -1] = 1.0
    board.look(1, 3, {"pos": positions, "first": named}, {"pos": place, "tok": token, "bos": rest})
    board.move(1, 3, {"tok": eye}, {"out": eye * _SHARE})
    board.answer("out", LETTERS, GAIN)
    board.distract(seed=7)
    return finish(
        board,
        "backup",
        "a0.h0 copies the previous token; a1.h3 would copy it too, but rests while a0.h0 does so.",
        reasons={
            "input->a0.h0<v>": both("the primary head's token comes from the embedding"),
            "a0.h0->logits": both("the primary head writes where the logits read"),
            "a0.h0->a1.h3<q>": both("what the primary head wrote keeps the backup away; cutting"
                                    " this edge wakes the backup and raises the answer"),
            "input->a1.h3<k>": both("the backup knows by its keys which token is named already"),
            "input->a0.h0<q>": only("zero", _FIXED),
            "input->a0.h0<k>": only("zero", _FIXED),
            "input->a1.h3<q>": only("zero", "where the backup looks and rests"),
        },
        notes=(
            f"The backup writes {_SHARE} times what the primary writes, so the primary head alone,"
            " resampled as a whole, moves the logit difference little, and the backup alone not at"
            " all; both together turn the answer around (`joint`).",
            "While the primary works, the backup rests on <bos> and a1.h3->logits carries nothing.",
        ),
        draw=letters(6, lambda words: words[-2]),
        joint={"a0.h0": 0.1, "a1.h3": 0.0, "a0.h0+a1.h3": 1.0},
    )  # fmt: skip


def redundant() -> Wired:
    """Three heads that do the same, and an MLP that takes the majority."""
    heads = (0, 1, 3)
    board = text_board(LETTERS, {"votes": _N, "out": _N}, layers=2, neurons=32)
    eye, size = torch.eye(_N), board.size.context
    for head in heads:
        board.look(0, head, {"pos": torch.eye(size) * 12.0}, {"pos": shift(size)})
        board.move(0, head, {"tok": eye}, {"votes": eye})
    # min(relu(votes - 1.2), 0.6) / 0.6: one vote counts nothing, two count as much as three.
    board.neurons(1, {"votes": eye}, {"out": eye / 0.6}, bias=-1.2)
    board.neurons(1, {"votes": eye}, {"out": -eye / 0.6}, bias=-1.8)
    board.answer("out", LETTERS, GAIN)
    board.distract(seed=8)
    return finish(
        board,
        "redundant",
        "a0.h0, a0.h1 and a0.h3 all copy the previous token; m1 outputs what at least two say.",
        reasons={"m1->logits": both("the majority's token is written where the logits read")},
        notes=(
            "Each of the edges input->a0.h<v>, a0.h->m1 (h = 0, 1, 3) is part of the mechanism"
            " (truth['compiled']) and has no effect by itself: two heads are a majority.",
            "Any two heads resampled together turn the answer around (`joint`).",
        ),
        draw=letters(6, lambda words: words[-2]),
        joint={
            **{f"a0.h{h}": 0.0 for h in heads},
            **{f"a0.h{g}+a0.h{h}": 1.0 for g, h in ((0, 1), (0, 3), (1, 3))},
            "a0.h0+a0.h1+a0.h3": 1.0,
        },
    )


# Of the first 200 seeds that answer all prompts by a logit or more, the one whose weakest edge is
# strongest (0.2 percent of the range).
_LINEAR_SEED = 167


def linear() -> Wired:
    """A network without any nonlinearity, where every part has a share in the answer."""
    size = Size(layers=2, heads=2, d_head=16, neurons=8, activation="linear")
    board = Board("gpt2", ("x", "y"), {"pos": 12, "sign": 1, "mix": 8, "out": 1}, size)
    board.embed[board.token("x"), board.at("sign")] = 1.0
    board.embed[board.token("y"), board.at("sign")] = -1.0
    make = torch.Generator().manual_seed(_LINEAR_SEED)
    live = [s for name in ("sign", "mix", "out") for s in _dims(board, name)]

    def noise(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=make) * scale

    board.positions[:, board.at("pos")] = noise(12, 12, 1.0)
    for layer in range(size.layers):
        for head in range(size.heads):
            # Scores are constant: the query reads nothing, and keys read positions only into
            # features that the query does not have.
            board.q_bias[layer, head, 0] = board.k_bias[layer, head, 0] = 1.0
            board.k[layer, head, board.at("pos"), 1:] = noise(12, 15, 0.5)
            board.v[layer, head, live] = noise(len(live), size.d_head, 0.25)
            board.o[layer, head][:, live] = noise(size.d_head, len(live), 0.12)
        board.mlp_in[layer, live] = noise(len(live), size.neurons, 0.3)
        board.mlp_out[layer][:, live] = noise(size.neurons, len(live), 0.15)
        board.mlp_bias[layer] = noise(1, size.neurons, 0.3)[0]
    # The designed part: the mean of all signs.
    board.v[0, 0, board.at("sign"), 0] += 1.0
    board.o[0, 0, 0, board.at("out")] += 8.0
    reads = noise(len(live), 1, 0.05)
    reads[-1] += 1.0
    board.unembed[live, board.token("x")] = 2 * reads[:, 0]
    board.unembed[live, board.token("y")] = -2 * reads[:, 0]
    board.embed[:, board.at(JUNK)] = noise(len(board.vocab), board.sizes[JUNK], 1.0)

    def solve(prompt: tuple[str, ...]) -> str:
        return max(("x", "y"), key=prompt.count)

    true = [e for e in board.edges() if not e.endswith(("<q>", "<k>"))]
    return finish(
        board,
        "linear",
        "Uniform attention and MLPs without activation: a0.h0 averages the words' signs, every"
        " other part adds a little, and the logit difference is linear in all of them.",
        reasons={e: both("every value and MLP edge carries a share, linearly") for e in true},
        notes=(
            "EAP, attribution patching and exact edge patching agree to float precision, and the"
            " effects of the edges into the logits sum to the contrast's difference minus the"
            " clean one's.",
            "Attention does not depend on the tokens, so query and key edges have no effect.",
            "Uniform scores, halved, are uniform, so model.check() finds the scores edit idle.",
        ),
        draw=letters(7, solve, words=("x", "y")),
    )


def _dims(board: Board, space: str) -> range:
    place = board.at(space)
    return range(place.start, place.stop)
