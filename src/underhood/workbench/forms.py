"""Methods as forms: a method's signature and docstring say what a page asks for.

What comes back from a page is read by the same rules as a command line's words
(`cli.arguments`), so that a value means the same in both. Files of the machine cannot be named: an
option that is a second set of pairs is filled in like the first, one that is a plan of edits names
a saved one.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import Field

from underhood.cli.arguments import (
    Given,
    data_arguments,
    data_flags,
    pairs_of,
    read_options,
    type_name,
)
from underhood.core.errors import UsageError
from underhood.methods.registry import REQUIRED
from underhood.workbench.asking import Asked, Many, Prompt, Short

if TYPE_CHECKING:
    from underhood.core.edit import Plan
    from underhood.data import Pairs
    from underhood.methods.registry import Method, Parameter

__all__ = ["Columns", "Options", "arguments", "card", "control"]


class Columns(Asked):
    """Rows of pairs, column by column."""

    prompts: Many = []
    contrasts: Many = []
    answers: Many = []
    wrong: Many = []


Options = Annotated[dict[Short, Prompt | Columns], Field(max_length=50)]
"""By name: as it would be typed, a set of pairs, or the id of a saved plan."""

_SHOWN = ("Returns", "Raises", "Cost", "Source", "Misleads", "Example")


def card(method: "Method") -> dict[str, Any]:
    """What a page shows of a method, and the fields of its form."""
    sections = method.sections
    return {
        "name": method.name,
        "family": method.family,
        "summary": method.summary,
        "about": sections[""],
        "sections": [[name, sections[name]] for name in _SHOWN if name in sections],
        "data": _data(method),
        "options": [_field(p) for p in method.parameters if p.option],
    }


def _data(method: "Method") -> list[dict[str, Any]]:
    return [
        {"name": p.name, "about": p.about, "required": p.default is REQUIRED, "kind": _reads(p)}
        for p in method.parameters
        if not p.option
    ]


def _reads(parameter: "Parameter") -> str:
    """`prompt`, `pairs`, `model`, or "" for what only Python can give."""
    flags = data_flags(parameter)
    return {"--prompt": "prompt", "--prompt --vs": "pairs", "--other": "model"}.get(flags, "")


def _field(parameter: "Parameter") -> dict[str, Any]:
    """One option: how it is asked for, its default as text, what it means."""
    return {
        "name": parameter.name,
        "control": control(parameter),
        "choices": [str(v) for a in _leaves(parameter) for v in get_args(a)]
        if control(parameter) == "choice"
        else [],
        "whole": _leaves(parameter) == [int],
        "type": type_name(parameter.type),
        "default": None if parameter.default is REQUIRED else _text(parameter.default),
        "required": parameter.default is REQUIRED,
        "about": parameter.about,
    }


def control(parameter: "Parameter") -> str:
    """How an option is asked for: `pairs`, `plan`, `choice`, `switch`, `number` or `text`."""
    leaves = _leaves(parameter)
    for name in ("Pairs", "Plan"):
        if any(getattr(a, "__name__", "") == name for a in leaves):
            return name.lower()
    if len(leaves) != 1:
        return "text"
    if get_origin(leaves[0]) is Literal:
        return "choice"
    return {bool: "switch", int: "number", float: "number"}.get(leaves[0], "text")


def _leaves(parameter: "Parameter") -> list[Any]:
    """The types that an option can have, None left out."""
    said = parameter.type
    members = get_args(said) if "Union" in type(said).__name__ else (said,)
    return [a for a in members if a is not type(None)]


def _text(value: Any) -> str:
    """A default as it would be typed."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def arguments(
    method: "Method",
    given: Given,
    options: Mapping[str, str | Columns],
    saved: Callable[[str], "Plan"],
) -> dict[str, Any]:
    """A form's answers as the method's arguments.

    Args:
        method: The method.
        given: Prompts, contrasts and answers.
        options: By name; empty ones are left at their default.
        saved: Gives a saved plan by its id.

    Raises:
        UsageError: Something is missing, unknown, not of its type, or names a file.
        FileProblem: No such plan.
    """
    controls = {p.name: control(p) for p in method.parameters if p.option}
    ready: dict[str, Any] = {}
    settings = []
    for name, value in options.items():
        how = controls.get(name)
        if value == "":
            continue
        if how == "pairs":
            ready |= {name: pairs} if (pairs := _pairs(name, value)) is not None else {}
        elif isinstance(value, Columns):
            raise UsageError(f"the option {name!r} is no set of pairs", given=name, do="write text")
        elif how == "plan":
            ready[name] = saved(value)
        else:
            settings.append(f"{name}={value}")
    return data_arguments(method, given) | read_options(method, settings, ready)


def _pairs(name: str, said: str | Columns) -> "Pairs | None":
    """A second set of pairs; None where nothing was filled in."""
    if isinstance(said, str):
        raise UsageError(
            f"the option {name!r} is a set of pairs, and a page names no file",
            given=said[:80], do='send {"prompts": [...], "contrasts": [...]}, or use Python',
        )  # fmt: skip
    given = Given(said.prompts, said.contrasts, said.answers, said.wrong)
    found = pairs_of(given)
    if found is None and given != Given([], [], [], []):
        raise UsageError(
            f"the second set of pairs, {name!r}, is half empty",
            given=f"{len(said.prompts)} prompts, {len(said.contrasts)} contrasts",
            do="give a contrast for each prompt",
        )  # fmt: skip
    return found
