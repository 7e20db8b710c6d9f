"""Documents on disk: one JSON file, and one safetensors file beside it when there are tensors.

Both are written to temporary names first and renamed last, so an interrupted save leaves what was
there before. Reading checks the schema's name and major version.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from underhood.core.errors import FileProblem

__all__ = ["read_document", "write_document"]


def write_document(path: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write `path` (suffix .json) and its tensors; returns the JSON file's path."""
    path = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".safetensors")
    document = document | {"tensors": beside.name if tensors else None}
    if tensors:
        draft = beside.with_suffix(".safetensors.part")
        # One storage per tensor: safetensors refuses tensors that share memory.
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, draft)
        os.replace(draft, beside)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(draft, path)
    return path


def read_document(
    path: Path, schema: str, problem: type[FileProblem] | type[Any] = FileProblem
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a document and its tensors.

    Raises:
        problem: Missing, truncated, another kind of file, or from a newer version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise problem(f"there is no file {path}", given=str(path), do="check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(
            "the file is truncated or not JSON", given=str(path), why=str(error), do="save it again"
        ) from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != schema:
        kind, _, version = str(found).partition("/")
        newer = kind == schema.partition("/")[0] and version.isdecimal()
        raise problem(
            "the file comes from a newer version" if newer else "the file is of another kind",
            given=f"{path}: schema {found!r}",
            why=f"this version reads {schema!r}",
            do="update underhood" if newer else "give a file that this version wrote",
        )
    tensors: dict[str, Tensor] = {}
    if document.get("tensors"):
        beside = path.parent / Path(document["tensors"]).name
        try:
            tensors = load_file(beside)
        except (FileNotFoundError, SafetensorError, OSError) as error:
            raise problem(
                "the tensors beside the file are missing or damaged",
                given=str(beside),
                why=str(error),
                do="keep both files together, or save again",
            ) from error
    return document, tensors
