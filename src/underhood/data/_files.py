"""Reading text, JSON and JSON-lines, with the file and the line in every refusal."""

import json
from dataclasses import dataclass
from pathlib import Path

from underhood.core.errors import FileProblem

__all__ = ["Document", "read_json", "read_text"]


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    Attributes:
        value: What the file holds; for JSON-lines the list of its lines' values.
        places: For JSON-lines the place of each value ("line 3 of x.jsonl"); None otherwise.
    """

    value: object
    places: tuple[str, ...] | None = None


def read_text(path: str | Path) -> str:
    """The file's text, line ends untouched.

    Raises:
        FileProblem: Missing, a folder, unreadable, empty, or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileProblem(
            f"{path.name!r} {kind}", given=str(path), do="give the path of a readable file"
        )
    try:
        # utf-8-sig: spreadsheets put a byte-order mark before the first column's name.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileProblem(
            f"{path.name!r} is not UTF-8 text",
            given=f"{path}, byte {error.start}",
            why=error.reason,
            do="save it as UTF-8, or give the file that was meant",
        ) from None
    except OSError as error:
        raise FileProblem(
            f"{path.name!r} cannot be read",
            given=str(path),
            why=error.strerror,
            do="check the file's permissions",
        ) from error
    if not text.strip():
        raise FileProblem(
            f"{path.name!r} is empty", given=str(path), do="write or download it again"
        )
    return text


def read_json(path: str | Path) -> Document:
    """A JSON or JSON-lines file; which of them is decided by its content, not only by its name.

    feature-circuits publishes JSON-lines under the name `.json`, so the name alone cannot decide.

    Raises:
        FileProblem: As `read_text`, or the text is not JSON (with the line).
    """
    path, text = Path(path), read_text(path)
    if path.suffix == ".jsonl":
        return _lines(path, text)
    try:
        return Document(json.loads(text))
    except json.JSONDecodeError as error:
        first, *rest = [line for line in text.splitlines() if line.strip()]
        if rest and _is_json(first):
            return _lines(path, text)
        raise _not_json(path, text, error) from None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _lines(path: Path, text: str) -> Document:
    values: list[object] = []
    places: list[str] = []
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number} of {path.name}"
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise FileProblem(
                f"{place} is not JSON",
                given=_shorten(line),
                why=f"{error.msg} at column {error.colno}",
                do="write one complete JSON value per line; a cut last line means that the file"
                " is truncated: write or download it again",
            ) from None
        places.append(place)
    return Document(values, tuple(places))


def _not_json(path: Path, text: str, error: json.JSONDecodeError) -> FileProblem:
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return FileProblem(
        f"{path.name!r} is not JSON" + (": it ends too early" if cut else ""),
        given=f"{path}, line {error.lineno}, column {error.colno}",
        why=error.msg,
        do="the file seems truncated: write or download it again"
        if cut
        else "correct that line, or give the file that was meant",
    )


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
