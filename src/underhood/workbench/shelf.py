"""The shelf: what jobs found, as files in one folder, addressed by id and never by path.

An id is a file's stem. What lies there is what `Result.save`, `Explanation.save` and `Plan.save`
write, so Python, the command line and a page open the same files; the `schema` inside says which it
is. A file that is damaged or of a newer version is listed with its reason; nothing else suffers.
"""

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from underhood.core.errors import FileProblem, UnderhoodError
from underhood.view.doc import View
from underhood.view.files import read
from underhood.view.schema import check_schema, parse_json

if TYPE_CHECKING:
    from underhood.core.edit import Plan
    from underhood.explanation import Explanation
    from underhood.view import Result

__all__ = ["Shelf"]

_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,99}")
KINDS = ("result", "explanation", "plan")
SHOWN = 500  # entries of a listing, newest first


@dataclass(slots=True)
class Shelf:
    """A folder of results.

    Attributes:
        folder: Where they lie; made when the first one is kept.
    """

    folder: Path
    _known: dict[tuple[str, int, int], dict[str, Any]] = field(default_factory=dict, repr=False)

    # Keeping -------------------------------------------------------------------------------------

    def keep(self, found: "Result | Explanation | Plan", name: str) -> str:
        """Save something under a new id, which is returned."""
        self.folder.mkdir(parents=True, exist_ok=True)
        words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40] or "plan"
        key = f"{time.strftime('%Y%m%d-%H%M%S')}-{words}-{secrets.token_hex(3)}"
        found.save(self.folder / f"{key}.json")
        return key

    # Finding -------------------------------------------------------------------------------------

    def path(self, key: str) -> Path:
        """The file of an id.

        Raises:
            FileProblem: No such id, or one that would lead out of the folder.
        """
        place = self.folder / f"{key}.json"
        if not _ID.fullmatch(key) or place.is_symlink() or not place.is_file():
            raise FileProblem(
                "there is no such result", given=key[:120], do="choose one of the list"
            )
        return place

    def entries(self) -> list[dict[str, Any]]:
        """One row per file, newest first; a damaged one says its `problem`."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):  # another client deletes
                if _ID.fullmatch(path.stem) and path.is_file() and not path.is_symlink():
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        return [self._entry(*one) for one in sorted(found, reverse=True)[:SHOWN]]

    def _entry(self, time_ns: int, size: int, path: Path) -> dict[str, Any]:
        stamp = (path.stem, time_ns, size)
        if stamp not in self._known:
            self._known[stamp] = _described(path)
        return self._known[stamp] | {"id": path.stem, "date": time_ns / 1e9, "bytes": size}

    def open(self, key: str) -> dict[str, Any]:
        """What a page draws: kind, title, views (as documents), provenance.

        Raises:
            FileProblem: It is missing, truncated, or from a newer version.
        """
        path = self.path(key)
        with _whole(path.name):
            return _opened(key, path, _document(path))

    def plan(self, key: str) -> "Plan":
        """A saved plan of edits.

        Raises:
            FileProblem: No such file, or it holds something else.
        """
        from underhood.core.edit import Plan

        return Plan.load(self.path(key))

    def report(self, key: str) -> str:
        """One self-contained HTML page."""
        found = self.open(key)
        with _whole(key):
            return _page(found)

    def drop(self, key: str) -> None:
        """Delete a result and what lies beside it."""
        path = self.path(key)
        path.unlink(missing_ok=True)
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def _opened(key: str, path: Path, document: dict[str, Any]) -> dict[str, Any]:
    kind, made = _kind(document, path.name), document.get("provenance")
    opened = {"id": key, "kind": kind, "provenance": made if isinstance(made, dict) else {}}
    if kind == "result":
        from underhood.view import Result

        found = Result.load(path)
        title, view = found.view.title or found.name, found.view.to_dict()
        return opened | {"title": title, "name": found.name, "views": [view]}
    if kind == "explanation":
        return opened | _explained(document, path.name)
    from underhood.core.edit import Plan

    edits = [
        {"saved": key, "index": i, "strength": e.strength, "unit": e.unit, "text": repr(e)}
        for i, e in enumerate(Plan.load(path))
    ]
    return opened | {"title": "Plan of edits", "views": [], "edits": edits}


@contextmanager
def _whole(where: str) -> Iterator[None]:
    """What a damaged part of a file does to its reader, as an error that names the file."""
    try:
        yield
    except UnderhoodError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise FileProblem(
            "the file is damaged", given=where, why=f"{type(error).__name__}: {reason}",
            do="make it again, or delete it",
        ) from error  # fmt: skip


def _page(found: dict[str, Any]) -> str:
    from underhood.view.page import Section, page

    told = found.get("sections") or [found | {"id": "result"}]
    sections = [
        Section(
            id=s.get("id") or f"part{i}", title=s["title"], number=s.get("number", ""),
            question=s.get("question", ""), answer=s.get("answer", ""),
            folded=bool(s.get("folded")), views=[View.from_dict(v) for v in s["views"]],
        )
        for i, s in enumerate(told, 1)
    ]  # fmt: skip
    made = found["provenance"]
    return page(
        found["title"], sections, lead=found.get("lead", ""), provenance=made,
        python=made.get("call"),
    )  # fmt: skip


def _document(path: Path) -> dict[str, Any]:
    document = parse_json(read(path), path.name)
    if not isinstance(document, dict):
        raise FileProblem(
            "this is no result", given=path.name, do="keep only result files in this folder"
        )
    return document


def _kind(document: dict[str, Any], where: str) -> str:
    kind = str(document.get("schema")).partition("/")[0]
    if kind not in KINDS:
        raise FileProblem(
            "this is no result", given=f"{where}: schema {document.get('schema')!r}",
            why=f"the kinds are {', '.join(KINDS)}", do="keep only result files in this folder",
        )  # fmt: skip
    return kind


def _described(path: Path) -> dict[str, Any]:
    try:
        document = _document(path)
        kind = _kind(document, path.name)
    except UnderhoodError as error:
        return {"kind": "problem", "title": path.name, "model": "", "problem": str(error)}
    if kind == "plan":
        about = document.get("model") or {}
        edits = document.get("edits") or []
        return {
            "kind": kind,
            "title": f"{len(edits)} edit{'s' * (len(edits) != 1)}",
            "model": _text(about, "name"),
        }
    about = document.get("provenance") or {}
    title = document.get("prompt") if kind == "explanation" else document.get("name")
    return {
        "kind": kind, "title": str(title), "model": _text(about, "model"),
        "prompt": _text(about, "prompt"),
    }  # fmt: skip


def _text(about: Any, name: str) -> str:
    value = about.get(name) if isinstance(about, dict) else None
    return "" if value is None else str(value)[:200]


def _explained(document: dict[str, Any], where: str) -> dict[str, Any]:
    """An explanation's parts, each view checked."""
    check_schema(document.get("schema"), "explanation/1", where)
    sections = [
        s | {"views": [View.from_dict(v, where=where).to_dict() for v in s["views"]],
             "title": str(s["title"])}
        for s in document["sections"]
    ]  # fmt: skip
    answer, sentences = str(document["answer"]), [str(s) for s in document["sentences"]]
    answers = [s.get("answer") for s in sections]
    lead = [line for line in sentences if line not in answers]
    return {
        "title": f"Why “{answer.strip()}”?", "sentences": sentences, "lead": lead,
        "sections": sections, "views": [view for s in sections for view in s["views"]],
    }  # fmt: skip


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two opened results side by side, and the difference where their pictures fit together."""
    return {"results": [one, other], "difference": _difference(one, other)}


def _difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """A, B and A - B of the first two heat maps of one size; labels that differ are both given."""
    for a, b in zip(_grids(one["views"]), _grids(other["views"]), strict=False):
        if (len(a["rows"]), len(a["cols"])) != (len(b["rows"]), len(b["cols"])):
            continue
        labels = {
            side: [x if x == y else f"{x} / {y}" for x, y in zip(a[side], b[side], strict=True)]
            for side in ("rows", "cols")
        }
        plain = [
            {k: v for k, v in grid.items() if k not in ("control", "cell_text", "marks", "limit")}
            | labels | {"title": name}
            for grid, name in ((a, "first"), (b, "second"))
        ]  # fmt: skip
        title = a.get("title") or one["title"]
        made = {"schema": "view/1", "kind": "diff", "title": title, "a": plain[0], "b": plain[1]}
        try:
            return View.from_dict(made).to_dict()
        except FileProblem:  # another unit or scale: not the same thing
            continue
    return None


def _grids(views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All grids, groups opened."""
    found: list[dict[str, Any]] = []
    for view in views:
        if view["kind"] == "grid":
            found.append(view)
        found += _grids(view.get("views", []))
    return found
