"""Results on disk: `NAME.json` beside `NAME.safetensors`.

Both files are complete on disk before either takes its name, and the JSON names the digest of the
arrays. So a save that is interrupted leaves the old pair, or at worst a pair that does not match
and is refused on loading; it never yields numbers of one run under the labels of another.
"""

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from underhood.core.errors import FileProblem, UsageError
from underhood.view import files
from underhood.view.clean import clean
from underhood.view.doc import View
from underhood.view.result import Result
from underhood.view.save import SUFFIXES
from underhood.view.schema import check_schema, parse_json

if TYPE_CHECKING:
    import xarray

SCHEMA = "result/1"

# What safetensors stores for numpy; the rest is refused rather than converted on the quiet.
_NUMERIC = {
    "float16", "float32", "float64", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool",
}  # fmt: skip


def save(result: Result, path: str | PathLike[str]) -> Path:
    """Write a result; see `Result.save`."""
    target = Path(path)
    if target.suffix.lower() in set(SUFFIXES) - {".json"}:
        result.view.save(target)
        return target
    document_at, arrays_at = _pair(target)
    arrays: dict[str, np.ndarray] = {}
    variables = {
        str(name): _describe(str(name), variable, name in result.data.coords, arrays)
        for name, variable in result.data.variables.items()
    }
    blob = _pack(arrays)
    document = {
        "schema": SCHEMA,
        "name": result.name,
        "provenance": result.provenance,
        "arrays": {"file": arrays_at.name, "sha256": hashlib.sha256(blob).hexdigest()},
        "attrs": clean(dict(result.data.attrs)),
        "variables": variables,
        "view": result.view.to_dict(),
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    files.write_all({arrays_at: blob, document_at: text.encode()})
    return document_at


def load(path: str | PathLike[str]) -> Result:
    """Read a result; see `Result.load`."""
    import xarray

    document_at, arrays_at = _pair(Path(path))
    where = str(document_at)
    document = parse_json(files.read(document_at), where)
    if not isinstance(document, dict):
        raise FileProblem("this is not a result document", given=where, do="see Result.save")
    check_schema(document.get("schema"), SCHEMA, where)
    if not arrays_at.exists():
        raise FileProblem(
            "the arrays of this result are missing",
            given=where,
            why=f"{arrays_at.name} must lie beside it",
            do="copy both files together",
        )
    try:
        arrays = _unpack(files.read(arrays_at), document["arrays"]["sha256"], arrays_at)
        parts: dict[bool, dict[str, Any]] = {True: {}, False: {}}
        for name, entry in document["variables"].items():
            values = arrays[name] if "values" not in entry else np.array(entry["values"], object)
            values = values.reshape(entry["shape"]) if "values" in entry else values
            if "values" in entry and entry.get("text"):
                values = values.astype(str)
            parts[bool(entry["coord"])][name] = (entry["dims"], values, entry.get("attrs", {}))
        data = xarray.Dataset(parts[False], coords=parts[True], attrs=document.get("attrs", {}))
        name, provenance = str(document["name"]), dict(document["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        if isinstance(problem, FileProblem):
            raise
        raise FileProblem(
            "this result document lacks parts, or they do not fit together",
            given=where,
            why=f"{type(problem).__name__}: {problem}",
            do="save the result again",
        ) from problem
    view = View.from_dict(document.get("view"), where=where)
    return Result(name=name, data=data, view=view, provenance=provenance)


def _pair(path: Path) -> tuple[Path, Path]:
    """The files for `NAME`, `NAME.json` or `NAME.safetensors`; other dots belong to the name."""
    stem = path.with_suffix("") if path.suffix in {".json", ".safetensors"} else path
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")


def _describe(
    name: str, variable: "xarray.Variable", coord: bool, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The JSON entry of one variable; numeric values go to `arrays` instead."""
    entry: dict[str, Any] = {
        "dims": [str(dim) for dim in variable.dims],
        "shape": list(variable.shape),
        "coord": coord,
        "attrs": clean(dict(variable.attrs)),
    }
    values = np.asarray(variable.values)
    if values.dtype.name in _NUMERIC:
        # Not `ascontiguousarray`, which turns a scalar into a vector.
        arrays[name] = values.astype(values.dtype.newbyteorder("="), order="C")
        return entry
    flat = values.ravel().tolist()
    if values.dtype.kind not in "UO" or not all(isinstance(v, str | bool | None) for v in flat):
        raise UsageError(
            f"variable {name!r} cannot be saved",
            given=f"dtype {values.dtype}",
            why="a result file holds real numbers, booleans and text",
            do="turn it into numbers or text first; a MultiIndex with reset_index()",
        )
    return entry | {"values": flat, "text": values.dtype.kind == "U"}


def _pack(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save as pack

    return pack(arrays)


def _unpack(blob: bytes, digest: str, where: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as unpack

    try:
        arrays = unpack(blob)
    except (SafetensorError, ValueError) as problem:
        raise FileProblem(
            "these arrays cannot be read",
            given=str(where),
            why=f"{problem}; the file may be truncated",
            do="copy or save it again",
        ) from None
    if hashlib.sha256(blob).hexdigest() != digest:
        raise FileProblem(
            "these arrays belong to another result",
            given=str(where),
            why="their digest is not the one that the document beside them names",
            do="copy both files together, or save the result again",
        )
    return arrays
