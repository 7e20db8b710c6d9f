"""Rows of pairs before any tokenizer: one vocabulary of keys, and the checks that text allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from underhood.core.errors import (
    AnswerError,
    EmptyPrompt,
    PairError,
    UnderhoodError,
    UsageError,
    nearest,
)
from underhood.data.protocols import Answer

__all__ = ["KEYS", "Row", "check_rows", "per_row", "read_row"]

KEYS = {
    "clean": "clean",
    "clean_prefix": "clean",
    "contrast": "contrast",
    "corrupt": "contrast",
    "corrupted": "contrast",
    "patch_prefix": "contrast",
    "answers": "answers",
    "answer": "answers",
    "clean_answer": "answers",
    "correct_idx": "answers",
    "wrong": "wrong",
    "wrong_answers": "wrong",
    "wrong_answer": "wrong",
    "patch_answer": "wrong",
    "incorrect_idx": "wrong",
    "label": "label",
    "case": "label",
}
"""Every spelling of a column that is read: ours, auto-circuit's, EAP-IG's, feature-circuits'."""

# EAP-IG's second, harder contrast; a row has one contrast, and this is not it.
_LEFT_OUT = frozenset({"corrupted_hard"})


@dataclass(frozen=True, slots=True)
class Row:
    """One pair. No answers means that nobody has filled them in yet."""

    clean: str
    contrast: str
    answers: tuple[Answer, ...] = ()
    wrong: tuple[Answer, ...] = ()
    label: str = ""


def as_answers(value: object, place: str, name: str) -> tuple[Answer, ...]:
    """One answer or a sequence of them, as a tuple.

    Raises:
        AnswerError: Something that is neither text nor a token id.
    """
    if value is None:
        return ()
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for item in items:
        # bool is an int in Python, and never a token id.
        if not isinstance(item, str | int) or isinstance(item, bool) or item == "":
            raise AnswerError(
                f"{name} of {place} holds something that is no answer",
                given=repr(item),
                why="an answer is the text of one token, or its id",
                do="write text such as ' Paris' (with the space, if the prompt ends without one)",
            )
    return tuple(cast("list[Answer]", items))


def per_row(value: object, n: int, *, single: bool, name: str) -> list[tuple[Answer, ...]]:
    """Answers of `n` rows from what a caller may write for them.

    Args:
        value: None; one answer or several (only when `single`); or one entry per row.
        n: Number of rows.
        single: Whether the prompts were given as bare strings, so that a flat list of answers
            belongs to the one row.
        name: "answers" or "wrong", for messages.

    Raises:
        PairError: Not one entry per row.
    """
    if value is None:
        return [()] * n
    flat = isinstance(value, str | int) or not isinstance(value, Sequence)
    if single and (flat or all(isinstance(item, str | int) for item in cast(list, value))):
        return [as_answers(value, "row 0", name)]
    entries = [] if flat else list(cast(Sequence[object], value))
    if len(entries) != n:
        raise PairError(
            f"there must be one entry of `{name}` per row",
            given=f"{n} prompts, and {repr(value) if flat else len(entries)} as `{name}`",
            do="give a list with one answer, or one list of answers, for each prompt",
        )
    return [as_answers(entry, f"row {i}", name) for i, entry in enumerate(entries)]


def read_row(
    row: Mapping[str, object],
    place: str,
    *,
    ignore: Sequence[str] = (),
    error: type[UsageError] = PairError,
) -> Row:
    """A row from a mapping, under any spelling of `KEYS`.

    Args:
        row: The mapping.
        place: What to call the row in messages: "row 3", "line 17 of x.csv".
        ignore: Keys to leave out.
        error: The type to raise: `PairError` for a caller's rows, `FileProblem` for a file's.

    Raises:
        PairError: A key that is missing, unknown or doubled, or a prompt that is not text
            (`FileProblem` for a file's rows).
    """
    found: dict[str, object] = {}
    for key, value in row.items():
        if key in ignore or key in _LEFT_OUT:
            continue
        field = KEYS.get(key)
        if field is None:
            raise error(
                f"{place} has an unknown column {key!r}",
                given=", ".join(map(str, row)),
                do=f"use one of the nearest names: {nearest(str(key), KEYS)};"
                f" or leave it out on purpose with ignore=[{key!r}]",
            )
        if field in found:
            raise error(
                f"{place} has two columns for `{field}`",
                given=", ".join(map(str, row)),
                do="keep one of them, and name the other in ignore=[...]",
            )
        found[field] = value
    label = found.get("label")
    return Row(
        _prompt(found, "clean", row, place=place, error=error),
        _prompt(found, "contrast", row, place=place, error=error),
        as_answers(found.get("answers"), place, "answers"),
        as_answers(found.get("wrong"), place, "wrong"),
        "" if label is None else str(label),
    )


def _prompt(
    found: Mapping[str, object],
    field: str,
    row: Mapping[str, object],
    *,
    place: str,
    error: type[UsageError],
) -> str:
    if field not in found:
        spellings = [key for key, meaning in KEYS.items() if meaning == field]
        raise error(
            f"{place} has no column for the {field} prompt",
            given=", ".join(map(str, row)) or "an empty row",
            do=f"name it {field} ({', '.join(spellings[1:])} are read too)",
        )
    value = found[field]
    if not isinstance(value, str):
        raise error(
            f"the {field} prompt of {place} is not text",
            given=f"{type(value).__name__}: {value!r}"[:120],
            do="give prompts as text; lists of token ids must be turned into text first",
        )
    return value


def check_rows(rows: Sequence[Row], places: Sequence[str]) -> None:
    """Refuse rows that no tokenizer could save.

    Raises:
        PairError: No rows, identical prompts, an answer that is also wrong, or answers in some rows
            only.
        EmptyPrompt: A prompt without text.
    """
    if not rows:
        raise PairError("there are no pairs", given="0 rows", do="give at least one row")
    answered = [i for i, row in enumerate(rows) if row.answers]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        if (problem := _row_problem(row, place)) is not None:
            raise problem
        if answered and not row.answers:
            raise PairError(
                f"{place} has no answer, and other rows have one",
                given=f"{len(answered)} of {len(rows)} rows have answers; row {i} has none",
                do="fill in the missing answers, or leave them out of all rows",
            )


def _row_problem(row: Row, place: str) -> UnderhoodError | None:
    for field, text in (("clean", row.clean), ("contrast", row.contrast)):
        if not text:
            return EmptyPrompt(
                f"the {field} prompt of {place} is empty",
                given=repr(text),
                do="write a prompt, or drop the row",
            )
    if row.clean == row.contrast:
        return PairError(
            f"clean and contrast of {place} are identical",
            given=repr(row.clean),
            why="nothing can be found by exchanging equal activations",
            do="change the word in the contrast that should change the answer, or drop the row",
        )
    if both := [answer for answer in row.answers if answer in row.wrong]:
        return PairError(
            f"an answer of {place} is also one of its wrong answers",
            given=f"answers {list(row.answers)}, wrong {list(row.wrong)}",
            why="their difference would be zero by construction",
            do=f"remove {both[0]!r} from one of the two",
        )
    if row.wrong and not row.answers:
        return UsageError(
            f"{place} has wrong answers and no right ones",
            given=f"wrong {list(row.wrong)}",
            do="give the answers too, or leave out both",
        )
    return None
