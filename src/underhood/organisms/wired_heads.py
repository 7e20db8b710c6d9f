"""Wired organisms whose work is done by attention: previous token, induction, GQA, decoys."""

from random import Random

import torch
from torch import Tensor

from underhood.organisms.wired_board import Board, Size
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

__all__ = ["GAIN", "decoy", "gqa", "induction", "previous_token", "shift", "text_board"]

# Attention is kept soft (about 0.9 on the right token), so that gradients are not all zero.
_SHARP = 5.0
GAIN = 8.0
_N = len(LETTERS)


def shift(size: int, by: int = 1) -> Tensor:
    """`[query position, key position]`-matrix that maps a key's position to `by` later."""
    return torch.eye(size).roll(by, 1)


def _look_at_previous(board: Board, layer: int, head: int) -> None:
    size = board.size.context
    board.look(layer, head, {"pos": torch.eye(size) * _SHARP}, {"pos": shift(size)})


def text_board(
    words: tuple[str, ...],
    spaces: dict[str, int],
    layers: int,
    *,
    neurons: int = 16,
    d_head: int = 16,
) -> Board:
    """A GPT-2 board that knows its tokens and positions."""
    size = Size(layers=layers, heads=4, d_head=d_head, neurons=neurons)
    base = {"tok": len(words), "bos": 1, "pos": size.context}
    board = Board("gpt2", words, base | spaces, size)
    board.tell("tok", words)
    board.tell("bos", ["<bos>"])
    board.count("pos")
    return board


def previous_token() -> Wired:
    """One head copies the token before the last one."""
    board = text_board(LETTERS, {"out": _N}, layers=2)
    _look_at_previous(board, 0, 1)
    board.move(0, 1, {"tok": torch.eye(_N)}, {"out": torch.eye(_N)})
    board.answer("out", LETTERS, GAIN)
    board.distract(seed=1)
    fixed = "it tells the head which position comes before which; it is equal in both prompts"
    return finish(
        board,
        "previous_token",
        "Head a0.h1 copies the token before the last one to the output.",
        reasons={
            "input->a0.h1<v>": both("the copied token comes from the embedding"),
            "a0.h1->logits": both("the head writes the copied token where the logits read"),
            "input->a0.h1<q>": only("zero", fixed),
            "input->a0.h1<k>": only("zero", fixed),
        },
        notes=("All other heads and both MLPs are noise that ends in a space nobody reads.",),
        draw=letters(6, lambda words: words[-2]),
    )


def _repeat(rng: Random) -> tuple[str, ...]:
    """Six different letters and one of the first five of them again."""
    words = rng.sample(LETTERS, 6)
    return (*words, words[rng.randrange(5)])


def _after_first(words: tuple[str, ...]) -> str:
    """What followed the last word where it stood first."""
    return words[words.index(words[-1]) + 1]


def _draw_repeat(rng: Random) -> Drawn:
    while True:
        drawn = until(rng, lambda: _repeat(rng), _after_first)
        if drawn.clean[-1] != drawn.contrast[-1]:
            return drawn


def induction() -> Wired:
    """A previous-token head and an induction head that reads it by its keys."""
    board = text_board(LETTERS, {"prev": _N, "out": _N}, layers=2)
    _look_at_previous(board, 0, 2)
    board.move(0, 2, {"tok": torch.eye(_N)}, {"prev": torch.eye(_N)})
    # The first token is a place to rest at, for queries that match nothing.
    _match(board, 1, 1, _SHARP + 1.0)
    board.move(1, 1, {"tok": torch.eye(_N)}, {"out": torch.eye(_N)})
    board.answer("out", LETTERS, GAIN)
    board.distract(seed=2)
    fixed = "positions, equal in both prompts"
    return finish(
        board,
        "induction",
        "a0.h2 tells each token what stood before it; a1.h1 looks for the token that came after"
        " the last word's first occurrence, and copies it.",
        reasons={
            "input->a0.h2<v>": both("the previous token's name comes from the embedding"),
            "a0.h2->a1.h1<k>": both("the induction head's keys are the previous tokens' names"),
            "input->a1.h1<q>": both("it asks for the last word"),
            "input->a1.h1<v>": both("it copies the found token's own name"),
            "a1.h1->logits": both("it writes where the logits read"),
            "input->a0.h2<q>": only("zero", fixed),
            "input->a0.h2<k>": only("zero", fixed),
            "input->a1.h1<k>": only("zero", "<bos> is its resting place, equal in both prompts"),
        },
        notes=("All other heads and both MLPs are noise that ends in a space nobody reads.",),
        draw=_draw_repeat,
    )


def _match(board: Board, layer: int, head: int, sharp: float) -> None:
    """Attend to tokens whose `prev` is the query's token, else to `<bos>`."""
    ones = torch.ones(_N, 1)
    query = {"tok": torch.cat([torch.eye(_N), ones], 1) * sharp}
    rest = torch.zeros(1, _N + 1)
    rest[0, _N] = 0.5
    names = torch.cat([torch.eye(_N), torch.zeros(_N, 1)], 1)
    board.look(layer, head, query, {"prev": names, "bos": rest})


def gqa() -> Wired:
    """Induction in a Llama with four query heads on two key/value heads."""
    size = Size(layers=2, heads=4, d_head=32, kv_heads=2)
    spaces = {"tok": _N, "bos": 1, "prev": _N, "out": _N, "shadow": _N}
    board = Board("llama", LETTERS, spaces, size)
    board.tell("tok", LETTERS)
    board.tell("bos", ["<bos>"])
    board.look_back(0, 0, sharp=0.3)
    board.move(0, 0, {"tok": torch.eye(_N)}, {"prev": torch.eye(_N)})
    for head, space in ((2, "out"), (3, "shadow")):
        _match(board, 1, head, _SHARP + 1.0) if head == 2 else _same_query(board, 1, head)
        board.write(1, head, {space: torch.eye(_N)})
    board.move(1, 2, {"tok": torch.eye(_N)}, {})
    board.answer("out", LETTERS, GAIN)
    board.distract(seed=3)
    return finish(
        board,
        "gqa",
        "Induction in grouped-query attention: a0.h0 (key/value head 0) finds the previous token by"
        " rotation alone, a1.h2 (key/value head 1) is the induction head.",
        reasons={
            "input->a0.h0<v>": both("the previous token's name, through value head 0"),
            "a0.h0->a1.h1<k>": both("keys of key/value head 1 are the previous tokens' names"),
            "input->a1.h2<q>": both("query head 2 asks for the last word"),
            "input->a1.h1<v>": both("value head 1 carries the found token's own name"),
            "a1.h2->logits": both("query head 2 writes where the logits read"),
            "input->a1.h1<k>": only("zero", "<bos> is the resting place, equal in both prompts"),
        },
        notes=(
            "Keys and values carry the number of the key/value head; queries that of the head.",
            "a0.h0 asks with a constant (its biases), so it has no query or key edge.",
            "a1.h3 shares a1.h2's keys and values, sees the same answer, and writes it to a space"
            " that nobody reads; a0.h1 shares a0.h0's and writes noise.",
        ),
        draw=_draw_repeat,
    )


def _same_query(board: Board, layer: int, head: int) -> None:
    """A query like its neighbour's, on keys that are wired already."""
    board.q[layer, head] = board.q[layer, head - 1]
    board.taken.add(("q", layer, head))


def decoy() -> Wired:
    """Previous token with paths that carry the right answer and lead nowhere."""
    board = text_board(LETTERS, {"out": _N, "shadow": _N, "echo": _N}, layers=2)
    eye = torch.eye(_N)
    for head, space in ((0, "out"), (3, "shadow")):
        _look_at_previous(board, 0, head)
        board.move(0, head, {"tok": eye}, {space: eye})
    # Attends to itself and passes the shadow on to a space that is not unembedded.
    own = torch.eye(board.size.context)
    board.look(1, 2, {"pos": own * _SHARP}, {"pos": own})
    board.move(1, 2, {"shadow": eye}, {"echo": eye})
    # Neurons that would write the answer, and stay below their threshold: a shadow is at most 1.
    board.neurons(1, {"shadow": eye}, {"out": 3 * eye}, bias=-1.5)
    board.answer("out", LETTERS, GAIN)
    board.distract(seed=4)
    fixed = "positions, equal in both prompts"
    return finish(
        board,
        "decoy",
        "a0.h0 copies the previous token to the output; a0.h3 copies it as well, to no effect.",
        reasons={
            "input->a0.h0<v>": both("the copied token comes from the embedding"),
            "a0.h0->logits": both("the head writes where the logits read"),
            "input->a0.h0<q>": only("zero", fixed),
            "input->a0.h0<k>": only("zero", fixed),
        },
        notes=(
            "Decoy: a0.h3 attends and copies exactly like a0.h0, into the space `shadow`.",
            "Decoy: a1.h2 passes the shadow on to `echo`, which is not unembedded.",
            "Decoy: m1 has neurons from `shadow` to the output, with thresholds that the shadow"
            " never reaches: all weights of the path a0.h3->m1->logits are there (it is in"
            " truth['compiled']) and its effect is zero.",
            "The answer can be read off a0.h3 and a1.h2 by a probe; it is not used.",
        ),
        draw=letters(6, lambda words: words[-2]),
    )
