"""Documents read back from disk: is it JSON, is it ours, is it a version that we read?"""

import json
import re
from typing import Any

from pydantic import ValidationError

from underhood.core.errors import FileProblem


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON text as Python, or a `FileProblem` that names `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise FileProblem(
            "this is not complete JSON",
            given=where,
            why=f"{problem}; the file may be truncated",
            do="copy or save it again",
        ) from None


def check_schema(found: Any, expected: str, where: str) -> None:
    """Accept `name/1` and `name/1.x`; refuse another name, a newer major, or none.

    Raises:
        FileProblem: it is something else, or was written by a newer underhood.
    """
    name, _, major = expected.partition("/")
    match = re.fullmatch(r"([a-z]+)/(\d+)(\.\d+)*", found) if isinstance(found, str) else None
    if match is None or match[1] != name:
        raise FileProblem(
            f"this is not a {name} document",
            given=f"{where}: schema {found!r}",
            why=f"it should say {expected!r}",
        )
    if match[2] != major:
        raise FileProblem(
            f"this {name} has another schema than this underhood reads",
            given=f"{where}: schema {found!r}",
            why=f"this version reads {expected!r}",
            do="upgrade underhood, or save the file again with this version",
        )


def first_reason(problem: ValidationError) -> str:
    """The first complaint of pydantic as one short line."""
    error = problem.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in error["loc"])
    reason = error["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
