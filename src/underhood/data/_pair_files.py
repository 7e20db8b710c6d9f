"""The file forms of pairs: recognised by content, turned into rows, with a place for each row."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from underhood.core.errors import FileProblem, PairError
from underhood.data._files import read_json, read_text
from underhood.data._rows import KEYS, Row, read_row
from underhood.data.prompts import few_shot

__all__ = ["SCHEMA", "document", "greater_than", "read"]

SCHEMA = "pairs/1"

_Read = tuple[list[Row], list[str], dict[str, Any]]
_ID_COLUMNS = ("correct_idx", "incorrect_idx")


def document(
    rows: Sequence[Row],
    *,
    labels: bool,
    position_labels: Sequence[str] | None,
    word_positions: Mapping[str, int] | None,
) -> dict[str, Any]:
    """The pairs as JSON values of schema `pairs/1`."""
    values = []
    for row in rows:
        value: dict[str, Any] = {
            "clean": row.clean,
            "contrast": row.contrast,
            "answers": list(row.answers),
            "wrong": list(row.wrong),
        }
        values.append(value | {"label": row.label} if labels else value)
    made: dict[str, Any] = {"schema": SCHEMA, "rows": values}
    if position_labels is not None:
        made["position_labels"] = list(position_labels)
    if word_positions is not None:
        made["word_positions"] = dict(word_positions)
    return made


def read(path: str | Path, *, ignore: Sequence[str] = (), shots: int = 5, seed: int = 0) -> _Read:
    """Rows, the place of each, and what else the file says (arguments of `Pairs`).

    Raises:
        FileProblem: Not readable, or in none of the known forms.
        PairError: A row that cannot be one.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _csv(path, ignore)
    parsed = read_json(path)
    value, extra = parsed.value, {}
    if isinstance(value, Mapping) and "schema" in value:
        if value["schema"] != SCHEMA:
            raise FileProblem(
                f"{path.name!r} is not of a schema that this version reads",
                given=f"schema {value['schema']!r}",
                why=f"this version reads {SCHEMA}",
                do="save it again with this version, or update underhood",
            )
        extra = _extra(path, value, "position_labels", "word_positions")
        value = _list_under(path, value, "rows")
    elif isinstance(value, Mapping) and "prompts" in value:
        extra = _extra(path, value, "seq_labels", "word_idxs")
        value = _list_under(path, value, "prompts")
    elif isinstance(value, Mapping):
        value = [value]  # JSON-lines of a single line
    if not isinstance(value, list):
        raise _unknown_form(path, type(value).__name__)
    places = list(parsed.places or [f"row {i} of {path.name}" for i in range(len(value))])
    for item, place in zip(value, places, strict=True):
        if not isinstance(item, Mapping):
            raise _unknown_form(path, f"{place}: {item!r}"[:120])
    if value and all(set(item) == {"input", "output"} for item in value):
        return _function_vectors(path, value, shots=shots, seed=seed)
    rows = [
        read_row(item, place, ignore=ignore, error=FileProblem)
        for item, place in zip(value, places, strict=True)
    ]
    return rows, places, extra


def greater_than(rows: Sequence[Row], places: Sequence[str]) -> list[Row]:
    """Rows whose two-digit label decides the answers: larger is right, the rest is wrong.

    Raises:
        PairError: A label that is not a number from 0 to 98.

    Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?"; the sums over both sides
    are what `prob_diff` compares.
    """
    made = []
    for row, place in zip(rows, places, strict=True):
        year = int(row.label) if row.label.isdecimal() and len(row.label) <= 2 else 99
        if year > 98:
            raise PairError(
                f"the label of {place} decides no greater-than answers",
                given=repr(row.label),
                why="it must be a number from 0 to 98, so that a larger two-digit one exists",
                do="correct the label, or load without greater_than and give answers yourself",
            )
        years = [f"{number:02d}" for number in range(100)]
        made.append(replace(row, answers=tuple(years[year + 1 :]), wrong=tuple(years[: year + 1])))
    return made


def _unknown_form(path: Path, given: str) -> FileProblem:
    return FileProblem(
        f"{path.name!r} holds no pairs",
        given=given,
        why='read are: {"schema": "pairs/1", "rows": [...]}, {"prompts": [...]}, a list or lines'
        " of rows with clean and contrast prompts, and CSV with a header",
        do="bring the file into one of these forms, or build Pairs(...) in Python",
    )


def _list_under(path: Path, value: Mapping[str, Any], key: str) -> list[Any]:
    rows = value.get(key)
    if not isinstance(rows, list):
        raise FileProblem(
            f"{path.name!r} has no list under {key!r}",
            given=", ".join(value),
            do=f"put the rows into a list under {key!r}",
        )
    return rows


def _extra(path: Path, value: Mapping[str, Any], labels: str, words: str) -> dict[str, Any]:
    names, positions = value.get(labels), value.get(words)
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise FileProblem(
            f"{labels!r} of {path.name!r} is not a list of names",
            given=repr(names)[:120],
            do="give one name per token position, or remove it",
        )
    if positions is not None and not (
        isinstance(positions, dict) and all(isinstance(at, int) for at in positions.values())
    ):
        raise FileProblem(
            f"{words!r} of {path.name!r} is not a table of positions",
            given=repr(positions)[:120],
            do='write {"word": position, ...} with whole numbers, or remove it',
        )
    return {"position_labels": names, "word_positions": positions}


def _function_vectors(
    path: Path, items: Sequence[Mapping[str, Any]], *, shots: int, seed: int
) -> _Read:
    plain = few_shot(items, shots, seed=seed)
    mixed = few_shot(items, shots, seed=seed, shuffled=True)
    rows = [
        Row(clean, contrast, (answer,))
        for clean, contrast, answer in zip(plain.prompts, mixed.prompts, plain.answers, strict=True)
    ]
    return rows, [f"row {i} of {path.name}" for i in range(len(rows))], {}


def _csv(path: Path, ignore: Sequence[str]) -> _Read:
    text = read_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: a quote that never closes would otherwise swallow the rest of the file.
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, places = [], []
    try:
        for line in lines:
            place = f"line {lines.line_num} of {path.name}"
            rows.append(read_row(_cells(line, place), place, ignore=ignore, error=FileProblem))
            places.append(place)
    except csv.Error as error:
        raise FileProblem(
            f"line {lines.line_num} of {path.name} is not CSV",
            given=str(path),
            why=str(error),
            do="the file seems truncated or wrongly quoted: write or download it again",
        ) from None
    return rows, places, {}


def _cells(line: Mapping[str | Any, str | Any], place: str) -> dict[str, Any]:
    """A CSV line as a row: ids as numbers, empty cells as absent.

    Raises:
        FileProblem: Another number of cells than columns, or an id that is no number.
    """
    if None in line or None in line.values():
        raise FileProblem(
            f"{place} has {'more' if None in line else 'fewer'} cells than there are columns",
            given=", ".join(str(cell) for cell in line.values() if cell is not None)[:120],
            why="the file is truncated here, or a comma inside a cell is not quoted",
            do="write or download the file again, or put the cell in quotes",
        )
    cells: dict[str, Any] = {}
    for name, cell in line.items():
        if name in _ID_COLUMNS:
            if not cell.strip().isdecimal():
                raise FileProblem(
                    f"{name} of {place} is no token id",
                    given=repr(cell),
                    do="write a whole number, or give the answers as text in a column `answers`",
                )
            cells[name] = int(cell)
        elif cell != "" or KEYS.get(name) in ("clean", "contrast"):
            cells[name] = cell
    return cells
