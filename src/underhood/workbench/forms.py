"""Methods as forms: a method's signature and docstring say what a page asks for.

What comes back from a page is read by the same rules as a command line's words
(`cli.arguments`), so that a value means the same in both. Files of the machine cannot be named.
"""

from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from underhood.cli.arguments import Given, data_arguments, data_flags, read_options, type_name
from underhood.core.errors import UsageError
from underhood.methods.registry import REQUIRED

if TYPE_CHECKING:
    from underhood.methods.registry import Method, Parameter

__all__ = ["arguments", "card"]

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
    leaves = [a for a in _leaves(parameter.type) if a is not type(None)]
    choices = [str(v) for a in leaves if get_origin(a) is Literal for v in get_args(a)]
    only = len(leaves) == 1
    control = "text"
    if _named(parameter, "Pairs") or _named(parameter, "Plan"):
        control = "python"
    elif only and choices:
        control = "choice"
    elif only and leaves[0] is bool:
        control = "switch"
    elif only and leaves[0] in (int, float):
        control = "number"
    return {
        "name": parameter.name,
        "control": control,
        "choices": choices,
        "whole": only and leaves[0] is int,
        "type": type_name(parameter.type),
        "default": None if parameter.default is REQUIRED else _text(parameter.default),
        "required": parameter.default is REQUIRED,
        "about": parameter.about,
    }


def _leaves(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if "Union" in type(annotation).__name__ else (annotation,)


def _named(parameter: "Parameter", name: str) -> bool:
    return any(getattr(a, "__name__", "") == name for a in _leaves(parameter.type))


def _text(value: Any) -> str:
    """A default as it would be typed."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def arguments(method: "Method", given: Given, options: dict[str, str]) -> dict[str, Any]:
    """A form's answers as the method's arguments.

    Args:
        method: The method.
        given: Prompts, contrasts and answers.
        options: By name, as text; empty ones are left at their default.

    Raises:
        UsageError: Something is missing, unknown, not of its type, or names a file.
    """
    for parameter in method.parameters:
        if (
            parameter.option
            and parameter.name in options
            and _field(parameter)["control"] == "python"
        ):
            raise UsageError(
                f"the option {parameter.name!r} cannot be given in a page",
                given=type_name(parameter.type),
                do=f"call the method from Python: uh.{method.family}.{method.name}(model, ...)",
            )
    settings = [f"{name}={value}" for name, value in options.items() if value != ""]
    return data_arguments(method, given) | read_options(method, settings)
