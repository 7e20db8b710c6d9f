"""Pairs as token ids of one model: every refusal that needs a tokenizer, and no forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from jaxtyping import Int
from torch import Tensor

from underhood.core.errors import (
    AnswerError,
    EmptyPrompt,
    PairError,
    ShapeMismatch,
    UnderhoodError,
)
from underhood.core.tokens import Tokens
from underhood.data._rows import Row
from underhood.data.protocols import Answer, Reads

__all__ = ["EncodedPairs", "encode", "usable_rows"]

_INDENT = "\n" + " " * 11  # continues the "Given:" line of an error
_PIECES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs of prompts with equally many tokens each.

    Attributes:
        clean: The clean prompts.
        contrast: The contrast prompts; row by row as long as the clean ones.
        answers: Ids of the right answers, padded with -1; no columns while they are not known.
        wrong: Ids of the wrong answers, padded with -1; no columns when there are none.
        first_difference: Per row the first position, counted from 0 at the row's own first token,
            where the two prompts hold different tokens. Under a causal model nothing before it can
            have an effect.
    """

    clean: Tokens
    contrast: Tokens
    answers: Int[Tensor, "batch n"]
    wrong: Int[Tensor, "batch m"]
    first_difference: list[int]

    def __len__(self) -> int:
        return len(self.clean)

    def rows(self, index: Sequence[int]) -> "EncodedPairs":
        """Some of the pairs, perhaps repeated."""
        first = [self.first_difference[i] for i in index]
        sides = self.clean.rows(index), self.contrast.rows(index)
        return EncodedPairs(*sides, self.answers[list(index)], self.wrong[list(index)], first)

    def blocks(self, size: int) -> list[range]:
        """The numbers of all pairs, `size` at a time: what `rows` takes for each pass."""
        return self.clean.blocks(size)

    def to(self, device: torch.device | str) -> "EncodedPairs":
        """The same on another device."""
        return EncodedPairs(
            self.clean.to(device),
            self.contrast.to(device),
            self.answers.to(device),
            self.wrong.to(device),
            self.first_difference,
        )


def encode(rows: Sequence[Row], model: Reads) -> EncodedPairs:
    """See `Pairs.encode`."""
    clean, contrast = _both(rows, model)
    known: dict[Answer, int] = {}
    first, answers, wrong = [], [], []
    for row in range(len(rows)):
        first.append(_first_difference(clean, contrast, row))
        right, other = _row_answers(rows[row], row, model, known)
        answers.append(right)
        wrong.append(other)
    device = clean.tokens.ids.device
    return EncodedPairs(
        clean.tokens, contrast.tokens, _padded(answers, device), _padded(wrong, device), first
    )


def usable_rows(rows: Sequence[Row], model: Reads) -> list[int]:
    """Numbers of the rows that `encode` accepts.

    Raises:
        PairError: There are none; the message carries the refusal of the first row.
    """
    clean, contrast = _both(rows, model)
    known: dict[Answer, int] = {}
    kept, first = [], None
    for row in range(len(rows)):
        try:
            _first_difference(clean, contrast, row)
            _row_answers(rows[row], row, model, known)
        except (PairError, AnswerError, EmptyPrompt) as error:
            first = first or error
        else:
            kept.append(row)
    if not kept:
        raise PairError(
            "no row of these pairs can be used with this model",
            given=f"{len(rows)} rows",
            why=None if first is None else first.what,
            do="see `pairs.encode(model)` for the first row's refusal in full",
        )
    return kept


@dataclass(frozen=True, slots=True)
class _Prompts:
    """One side of the pairs; each row's own ids as a list, fetched from the device only once."""

    tokens: Tokens
    ids: list[list[int]]


def _both(rows: Sequence[Row], model: Reads) -> tuple[_Prompts, _Prompts]:
    """The clean and the contrast prompts as tokens."""
    both = []
    for texts in ([row.clean for row in rows], [row.contrast for row in rows]):
        tokens = model.tokens(texts)
        if len(tokens) != len(rows):
            raise ShapeMismatch(
                "the tokenizer gave another number of rows than it got prompts",
                given=f"{len(rows)} prompts, {len(tokens)} rows",
                do="check the `tokens` method of this model",
            )
        table = zip(tokens.ids.tolist(), tokens.mask.tolist(), strict=True)
        both.append(_Prompts(tokens, [list(compress(ids, mask)) for ids, mask in table]))
    return both[0], both[1]


def _pieces(prompts: _Prompts, row: int) -> list[str]:
    strings = prompts.tokens.strings
    return list(strings[row]) if strings else [str(i) for i in prompts.ids[row]]


def _first_difference(clean: _Prompts, contrast: _Prompts, row: int) -> int:
    """Position of the first differing token of a row, or the refusal of the row."""
    a, b = clean.ids[row], contrast.ids[row]
    for name, ids in (("clean", a), ("contrast", b)):
        if not ids:
            raise EmptyPrompt(
                f"the {name} prompt of row {row} has no tokens", given="0 tokens", do="drop the row"
            )
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if len(a) == len(b) and at is not None:
        return at
    if at is None:
        at = min(len(a), len(b))
    if len(a) == len(b):
        raise PairError(
            f"clean and contrast of row {row} are identical as tokens",
            given=_aligned(_pieces(clean, row), _pieces(contrast, row), at),
            why="the tokenizer maps both texts to the same ids",
            do="use words that are in the vocabulary, or drop the row",
        )
    raise PairError(
        f"clean and contrast of row {row} have {len(a)} and {len(b)} tokens",
        given=_aligned(_pieces(clean, row), _pieces(contrast, row), at),
        why=f"activations are exchanged position by position; the prompts part at position {at}",
        do="exchange the differing word for one of as many tokens, or keep only the rows that"
        " fit this model: pairs.usable(model)",
    )


def _aligned(a: Sequence[str], b: Sequence[str], at: int) -> str:
    """Both prompts piece by piece, one above the other, up to the first difference."""
    start, stop = max(0, at - _PIECES_SHOWN), min(at + 2, max(len(a), len(b)))
    lines = {"clean": "…" if start else "", "contrast": "…" if start else "", "": " " * bool(start)}
    for i in range(start, stop):
        x, y = (_visible(row[i]) if i < len(row) else "" for row in (a, b))
        width = max(len(x), len(y))
        mark = "^" * max(width, 1) if i == at else ""
        for name, cell in (("clean", x), ("contrast", y), ("", mark)):
            lines[name] += "|" * bool(name) + " " * (not name) + cell.ljust(width)
    for name, row in (("clean", a), ("contrast", b)):
        lines[name] += "|…" if stop < len(row) else "|"
    return _INDENT.join(f"{name:9}{line}".rstrip() for name, line in lines.items())


def _visible(piece: str) -> str:
    return piece.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def _row_answers(
    texts: Row, row: int, model: Reads, known: dict[Answer, int]
) -> tuple[list[int], list[int]]:
    """Ids of a row's right and wrong answers; `known` is filled on the way."""
    for answer in (*texts.answers, *texts.wrong):
        if answer not in known:
            known[answer] = _answer_id(model, answer, row)
    right = [known[answer] for answer in texts.answers]
    wrong = [known[answer] for answer in texts.wrong]
    if both := set(right) & set(wrong):
        raise PairError(
            f"an answer and a wrong answer of row {row} are the same token",
            given=f"answers {list(texts.answers)}, wrong {list(texts.wrong)}:"
            f" both hold id {min(both)} ({model.token_text(min(both))!r})",
            why="their difference would be zero by construction",
            do="use answers that are different tokens of this model",
        )
    return right, wrong


def _answer_id(model: Reads, answer: Answer, row: int) -> int:
    if isinstance(answer, int):
        try:
            if answer >= 0:
                model.token_text(answer)
                return answer
            why = "ids start at 0"
        except UnderhoodError as error:
            why = error.what
        raise AnswerError(
            f"the answer {answer} of row {row} is no token id of this model",
            given=answer,
            why=why,
            do="use the model that the ids were made for, or give the answers as text",
        )
    try:
        return model.token_id(answer)
    except AnswerError:
        pieces = _answer_pieces(model, answer)
    other = answer[1:] if answer.startswith(" ") else " " + answer
    raise AnswerError(
        f"the answer {answer!r} of row {row} is not one token of this model",
        given=" | ".join(map(repr, pieces)) + f" ({len(pieces)} tokens)",
        why="metrics compare single logits",
        do=f"use {other!r}, which is one token"
        if _is_token(model, other)
        else "use an answer of one token, or let the prompt end with the first pieces and the"
        " answer be the next; pairs.usable(model) drops such rows",
    )


def _is_token(model: Reads, text: str) -> bool:
    try:
        model.token_id(text)
    except UnderhoodError:
        return False
    return True


def _answer_pieces(model: Reads, text: str) -> list[str]:
    pieces = list((model.tokens(text).strings or ((),))[0])
    # `tokens` adds what the model wants before a prompt; an answer has no BOS.
    if "".join(pieces) != text and "".join(pieces[1:]) == text:
        return pieces[1:]
    return pieces


def _padded(rows: list[list[int]], device: torch.device) -> Int[Tensor, "batch n"]:
    width = max(map(len, rows))
    padded = [row + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).reshape(len(rows), width)
