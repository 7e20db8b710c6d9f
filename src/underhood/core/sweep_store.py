"""What a sweep has done so far, in a small file: a stopped sweep goes on where it was.

The file holds one JSON object per line: first what the sweep is (hashes of weights, tokens, cells
and reader), then one line for every group of finished cells. Lines are only ever appended; a line
that a crash cut short is dropped when the file is read, and costs the cells of that one line.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underhood.core.edit import Plan
from underhood.core.errors import FileProblem, UsageError
from underhood.core.model import Model
from underhood.core.provenance import fingerprint
from underhood.core.tokens import Tokens

__all__ = ["Kept", "Store", "identify"]

SCHEMA = "sweep/2"
OLD = {"sweep/1": "it was kept by a version that did not look at all of the model's weights"}
PARTS = {
    "weights": "the model's weights",
    "tokens": "the prompts",
    "cells": "the cells",
    "reader": "what is read from the logits",
}


@dataclass(frozen=True, slots=True)
class Kept:
    """One finished cell.

    Attributes:
        values: What was read, per prompt.
        moved: How much its edits moved.
    """

    values: Float[Tensor, " batch"]
    moved: float


def identify(
    model: Model,
    tokens: Tokens,
    plans: Sequence[Plan],
    read: Callable[[Tensor], Tensor],
    columns: Tensor | None,
) -> dict[str, str]:
    """Short hashes by which a sweep is recognised.

    A reader is known by its name, the columns that it gets, and by what it reads from made-up
    logits: two metrics may be the same function with other answers inside.

    Raises:
        UsageError: A cell holds a Python function, which nobody can recognise again.
    """
    width = len(columns) if columns is not None else _vocabulary(model)
    make = torch.Generator().manual_seed(0)
    seen = read(torch.randn(len(tokens), width, generator=make).to(model.device) * 3)
    name = f"{getattr(read, '__module__', '')}.{getattr(read, '__qualname__', type(read).__name__)}"
    numbers = [f"{x:.4g}" for x in seen.detach().double().flatten().tolist()]
    digest = _Digest()
    return {
        "weights": fingerprint(model.module),
        "tokens": digest.of([tokens.ids, tokens.mask]),
        "cells": digest.of([list(plan) for plan in plans]),
        "reader": digest.of([name, columns, *numbers]),
    }


def _vocabulary(model: Model) -> int:
    """How many logits a token gets."""
    path = model.anatomy.head
    head = model.module.get_submodule(path) if path is not None else None
    if isinstance(head, nn.Linear):
        return head.weight.shape[0]
    config = getattr(model.config, "text_config", None) or model.config
    return int(getattr(config, "vocab_size", None) or 1)


class _Digest:
    """Hashes of edits, with those of their tensors remembered: cells often share them."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], bytes] = {}

    def of(self, value: Any) -> str:
        """A short hash of a value's content."""
        sha = hashlib.sha256()
        for piece in self._pieces(value):
            sha.update(piece)
            sha.update(b"\0")
        return sha.hexdigest()[:16]

    def _pieces(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, Tensor):
            yield self._tensor(value)
        elif is_dataclass(value):
            yield type(value).__name__.encode()
            for field in fields(value):
                yield field.name.encode()
                yield from self._pieces(getattr(value, field.name))
        elif isinstance(value, dict):
            yield from self._pieces(sorted(value.items()))
        elif isinstance(value, (list, tuple)):
            yield f"{len(value)}".encode()
            for item in value:
                yield from self._pieces(item)
        elif value is None or isinstance(value, (str, int, float, bool)):
            yield repr(value).encode()
        else:
            raise UsageError(
                "a sweep with this cell cannot be kept and gone on with",
                given=repr(value)[:80],
                why="it holds a Python function, which cannot be recognised again",
                do="use ops that are data (set_to, patch, ...), or leave `store` out",
            )

    def _tensor(self, value: Tensor) -> bytes:
        # All tensors of a sweep's cells are alive, so an address means one content.
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in self._tensors:
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
            sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
            self._tensors[key] = sha.digest()
        return self._tensors[key]


class Store:
    """The file of one sweep.

    Args:
        path: A file, or a folder, in which each sweep gets a file of its own.
        parts: From `identify`.
        cells: How many cells there are.
        batch: How many prompts.

    Raises:
        FileProblem: Another sweep's file, a damaged one, or a place that cannot be written.
    """

    def __init__(self, path: str | Path, parts: dict[str, str], cells: int, batch: int) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            every = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            self.path = self.path / f"sweep-{every}.jsonl"
        self.parts, self.cells, self.batch = parts, cells, batch
        self.done: dict[int, Kept] = {}
        if self.path.exists():
            self._read()
        else:
            self._begin()

    def _begin(self) -> None:
        head = {"schema": SCHEMA, "cells": self.cells, "rows": self.batch, "parts": self.parts}
        draft = self.path.with_name(self.path.name + ".part")
        try:
            draft.write_text(json.dumps(head) + "\n", encoding="utf-8")
            os.replace(draft, self.path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> FileProblem:
        return FileProblem(
            "the sweep's file cannot be written",
            given=str(self.path),
            why=str(error.strerror or error),
            do="give a file in a folder that exists and can be written",
        )

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise self._damaged(str(error.strerror or error)) from error
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if not lines and len(data) and not data.startswith(b'{"schema": "sweep'):
            raise self._damaged("it is not a file of a sweep")
        if not lines:
            self._begin()
            return
        try:
            head, *rows = [json.loads(line) for line in lines]
            if head.get("schema") != SCHEMA:
                schema = head.get("schema")
                raise self._damaged(OLD.get(schema, f"its schema is {schema!r}, not {SCHEMA!r}"))
            self._check(head)
            for row in rows:
                values = torch.tensor(row["values"], dtype=getattr(torch, row["dtype"]))
                kept = zip(row["cells"], values.view(-1, self.batch), row["moved"], strict=True)
                self.done |= {int(cell): Kept(value, moved) for cell, value, moved in kept}
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, FileProblem):
                raise
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        if len(whole) < len(data):  # cut short by a crash: later lines must start on their own
            os.truncate(self.path, len(whole))

    def _check(self, head: dict[str, Any]) -> None:
        other = [PARTS[name] for name in PARTS if head["parts"].get(name) != self.parts[name]]
        if other:
            raise FileProblem(
                "the file belongs to another sweep",
                given=str(self.path),
                why=f"it was made with other values of: {', '.join(other)}",
                do="give another file, or a folder, where each sweep gets its own",
            )

    def _damaged(self, why: str) -> FileProblem:
        return FileProblem(
            "this is not a readable file of a sweep",
            given=str(self.path),
            why=why,
            do="give another file, or remove this one",
        )

    def add(
        self, cells: Sequence[int], values: Float[Tensor, "cell batch"], moved: Sequence[float]
    ) -> None:
        """Keep some finished cells; later lines win over earlier ones."""
        row = {
            "cells": list(cells),
            "dtype": str(values.dtype).removeprefix("torch."),
            "values": values.detach().double().cpu().tolist(),
            "moved": list(moved),
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error
