"""Writing a file so that it is either the old one or the new one, never half of one."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from underhood.core.errors import FileProblem


def write(path: Path, content: bytes) -> None:
    """Write one file through a temporary sibling and a rename.

    Raises:
        FileProblem: the folder is missing or cannot be written to.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files: all are complete on disk before the first takes its name.

    They take their names in the order given. An error or a kill before that leaves the old files
    as they were; no temporary file stays behind after an error.

    Raises:
        FileProblem: a folder is missing or cannot be written to.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            # Not `tempfile`: its files are for the owner alone, and results are meant to be shared.
            handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            staged.append((name, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged:
            os.replace(name, path)
    except OSError as problem:
        raise FileProblem(
            "this file cannot be written",
            given=", ".join(str(path) for path in contents),
            why=problem.strerror or str(problem),
            do="make the folder first, or choose another",
        ) from None
    finally:
        for name, _ in staged:
            name.unlink(missing_ok=True)


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        FileProblem: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as problem:
        raise FileProblem(
            "this file cannot be read",
            given=str(path),
            why=problem.strerror or str(problem),
        ) from None
