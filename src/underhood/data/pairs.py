"""Pairs: two prompts that differ where it matters, and what a model should say after each.

The clean prompt calls for one of `answers`, the contrast for something else (often for `wrong`).
Most causal methods exchange activations between the two runs, so both prompts must have equally
many tokens; `Pairs.encode` proves this, and everything else that can be wrong, before any forward.

    >>> pairs = Pairs("The uncles", "The uncle", " are", " is")
    >>> len(pairs), pairs.answers, pairs.needs_answers
    (1, ((' are',),), False)

What this does not do: make up contrasts, or cut prompts to a common length.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from underhood.core.errors import FileProblem, OutOfRange, PairError, UsageError
from underhood.data import _pair_files
from underhood.data._rows import Row, check_rows, per_row, read_row
from underhood.data.encoding import EncodedPairs, encode, usable_rows
from underhood.data.protocols import Answer, Reads

__all__ = ["Pairs"]

_Answers = Answer | Sequence[Answer | Sequence[Answer]] | None


@dataclass(frozen=True, init=False)
class Pairs:
    """Rows of (clean, contrast, answers, wrong). Immutable.

    Args:
        clean: Prompts, or a single one.
        contrast: As many prompts.
        answers: Per row one answer or a list of them: text of exactly one token (mind the leading
            space), or a token id. With single prompts, a flat list belongs to the one row. None:
            to be filled in later, see `with_answers`.
        wrong: Per row what the model should not say; None: metrics of a difference will refuse.
        labels: Per row anything to group or derive by (a case, a year).
        position_labels: Names of the token positions, where all prompts have one form.
        word_positions: Token positions of named words, where all prompts have one form.

    Attributes:
        clean: Prompts, one per row.
        contrast: Prompts, one per row.
        answers: One tuple per row, empty tuples while the answers are not known.
        wrong: One tuple per row, possibly empty.
        labels: One per row, or None.

    Raises:
        PairError: Lists of unequal length, identical prompts, an answer that is also wrong.
        EmptyPrompt: A prompt without text.
        AnswerError: An answer that is neither text nor an id.
    """

    clean: tuple[str, ...]
    contrast: tuple[str, ...]
    answers: tuple[tuple[Answer, ...], ...]
    wrong: tuple[tuple[Answer, ...], ...]
    labels: tuple[str, ...] | None
    position_labels: tuple[str, ...] | None
    word_positions: dict[str, int] | None

    def __init__(
        self,
        clean: str | Sequence[str],
        contrast: str | Sequence[str],
        answers: _Answers = None,
        wrong: _Answers = None,
        *,
        labels: str | Sequence[str] | None = None,
        position_labels: Sequence[str] | None = None,
        word_positions: Mapping[str, int] | None = None,
    ) -> None:
        single = isinstance(clean, str) and isinstance(contrast, str)
        clean = (clean,) if isinstance(clean, str) else tuple(clean)
        contrast = (contrast,) if isinstance(contrast, str) else tuple(contrast)
        labels = (labels,) if isinstance(labels, str) else labels
        for name, column in (("contrast", contrast), ("labels", labels)):
            if column is not None and len(column) != len(clean):
                raise PairError(
                    f"`clean` and `{name}` must have equally many rows",
                    given=f"{len(clean)} clean, {len(column)} {name}",
                    do=f"give one entry of `{name}` for each clean prompt",
                )
        n = len(clean)
        answers = per_row(answers, n, single=single, name="answers")
        wrong = per_row(wrong, n, single=single, name="wrong")
        rows = [Row(*row) for row in zip(clean, contrast, answers, wrong, strict=True)]
        check_rows(rows, [f"row {i}" for i in range(n)])
        values = {
            "clean": clean,
            "contrast": contrast,
            "answers": tuple(answers),
            "wrong": tuple(wrong),
            "labels": None if labels is None else tuple(labels),
            "position_labels": None if position_labels is None else tuple(position_labels),
            "word_positions": None if word_positions is None else dict(word_positions),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def one(
        cls, clean: str, contrast: str, answer: Answer | None = None, wrong: Answer | None = None
    ) -> "Pairs":
        """A single pair.

        Example:
            >>> Pairs.one("2 + 2 =", "2 + 3 =").needs_answers
            True
        """
        return cls(clean, contrast, answer, wrong)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], *, ignore: Sequence[str] = ()) -> "Pairs":
        """Pairs from mappings with `clean`, `contrast`, and maybe `answers`, `wrong`, `label`.

        The spellings of auto-circuit, EAP-IG and feature-circuits are read too.

        Args:
            rows: One mapping per row.
            ignore: Keys to leave out.

        Raises:
            PairError: A missing, unknown or doubled key (with the row number), or as `Pairs`.

        Example:
            >>> rows = [{"clean": "A B A", "contrast": "A C A", "answer": " B", "wrong": " C"}]
            >>> Pairs.from_rows(rows).wrong
            ((' C',),)
        """
        places = [f"row {i}" for i in range(len(rows))]
        read = [read_row(row, at, ignore=ignore) for row, at in zip(rows, places, strict=True)]
        return cls._from(read, places)

    @classmethod
    def _from(cls, rows: Sequence[Row], places: Sequence[str], **extra: Any) -> "Pairs":
        # Checked here although the constructor checks again: here a row is known by its file line.
        check_rows(rows, places)
        return cls(
            [row.clean for row in rows],
            [row.contrast for row in rows],
            [row.answers for row in rows],
            [row.wrong for row in rows],
            labels=[row.label for row in rows] if any(row.label for row in rows) else None,
            **extra,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        ignore: Sequence[str] = (),
        greater_than: bool = False,
        shots: int = 5,
        seed: int = 0,
    ) -> "Pairs":
        """Pairs from a file; its form is recognised by its content.

        Read are: our own JSON (`save`), auto-circuit JSON (`{"prompts": [...]}`), JSON or
        JSON-lines of rows (feature-circuits), CSV with a header (EAP-IG), and function-vectors JSON
        (`[{"input", "output"}]`), whose contrast is the same few-shot prompt with the outputs of
        its examples exchanged.

        Args:
            path: The file.
            ignore: Columns to leave out.
            greater_than: Fill in the answers from two-digit labels: every larger two-digit number
                is right, every other one wrong (EAP-IG's greater-than table).
            shots: Examples per prompt, for function-vectors files.
            seed: Which examples, for function-vectors files.

        Raises:
            FileProblem: Missing, truncated, or not one of these forms (with the line).
            PairError: As `Pairs`, with the line.
        """
        rows, places, extra = _pair_files.read(path, ignore=ignore, shots=shots, seed=seed)
        if greater_than:
            rows = _pair_files.greater_than(rows, places)
        return cls._from(rows, places, **extra)

    def save(self, path: str | Path) -> None:
        """Write the pairs as JSON (schema `pairs/1`); the file appears whole or not at all.

        Raises:
            UsageError: The name does not end in `.json`.
            FileProblem: The folder is missing or not writable.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise UsageError(
                "pairs are saved as JSON", given=str(path), do="let the file's name end in .json"
            )
        part = path.with_name(path.name + ".part")
        value = _pair_files.document(
            self._rows,
            labels=self.labels is not None,
            position_labels=self.position_labels,
            word_positions=self.word_positions,
        )
        text = json.dumps(value, ensure_ascii=False, indent=1)
        try:
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise FileProblem(
                f"{path.name!r} cannot be written",
                given=str(path),
                why=error.strerror,
                do="make the folder first, or choose another one",
            ) from error

    @property
    def _rows(self) -> list[Row]:
        labels = self.labels or ("",) * len(self)
        columns = (self.clean, self.contrast, self.answers, self.wrong, labels)
        return [Row(*row) for row in zip(*columns, strict=True)]

    @property
    def needs_answers(self) -> bool:
        """Whether the answers are still to be filled in."""
        return not self.answers[0]

    def with_answers(self, answers: _Answers, wrong: _Answers = None) -> "Pairs":
        """A copy with these answers, e.g. the model's own top predictions (text or token ids).

        Raises:
            PairError: As `Pairs`.

        Example:
            >>> Pairs.one("2 + 2 =", "2 + 3 =").with_answers(" 4", " 5").answers
            ((' 4',),)
        """
        # Bare strings keep the rule for single prompts: a flat list belongs to the one row.
        one = len(self) == 1
        return Pairs(
            self.clean[0] if one else self.clean,
            self.contrast[0] if one else self.contrast,
            answers,
            wrong,
            labels=self.labels,
            position_labels=self.position_labels,
            word_positions=self.word_positions,
        )

    def __len__(self) -> int:
        return len(self.clean)

    def __iter__(self) -> Iterator["Pairs"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, rows: int | slice | Sequence[int]) -> "Pairs":
        """The chosen rows, always as `Pairs`.

        Raises:
            OutOfRange: No such row.
            PairError: No rows are left.
        """
        n = len(self)
        if isinstance(rows, slice):
            rows = range(n)[rows]
        chosen = [rows] if isinstance(rows, int) else list(rows)
        if bad := [row for row in chosen if not -n <= row < n]:
            raise OutOfRange(
                f"there is no row {bad[0]} among these pairs",
                given=f"{n} rows",
                do=f"use 0 to {n - 1}",
            )
        return Pairs(
            [self.clean[i] for i in chosen],
            [self.contrast[i] for i in chosen],
            [self.answers[i] for i in chosen],
            [self.wrong[i] for i in chosen],
            labels=None if self.labels is None else [self.labels[i] for i in chosen],
            position_labels=self.position_labels,
            word_positions=self.word_positions,
        )

    def split(self, fraction: float, seed: int = 0) -> tuple["Pairs", "Pairs"]:
        """Two disjoint parts, drawn at random; the rows of each keep their order.

        Args:
            fraction: Share of the first part, strictly between 0 and 1; each part gets at least
                one row.
            seed: Decides the draw.

        Raises:
            OutOfRange: The fraction leaves a part empty by definition.
            PairError: Fewer than two rows.
        """
        n = len(self)
        if not 0 < fraction < 1:
            raise OutOfRange(
                "a split needs a fraction between 0 and 1", given=fraction, do="e.g. 0.8"
            )
        if n < 2:
            raise PairError("one row cannot be split", given="1 row", do="give two or more rows")
        size = min(max(round(fraction * n), 1), n - 1)
        first = set(random.Random(seed).sample(range(n), size))
        return self[sorted(first)], self[[i for i in range(n) if i not in first]]

    def encode(self, model: Reads) -> EncodedPairs:
        """The pairs as token ids of this model, proven comparable.

        Cost: two tokenisations of the batch, no forward.

        Raises:
            PairError: A row whose prompts differ in length or not at all as tokens, or whose answer
                and wrong answer are the same token.
            AnswerError: An answer that is not one token of this model.
            EmptyPrompt: A prompt without tokens.
        """
        return encode(self._rows, model)

    def usable(self, model: Reads) -> "Pairs":
        """Only the rows that `encode` accepts for this model; compare `len` to see how many.

        Raises:
            PairError: No row is usable.
        """
        return self[usable_rows(self._rows, model)]
