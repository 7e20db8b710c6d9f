"""From the words of a command line to a method's arguments, by the types in its signature.

Data: `str` is the one --prompt; `list[str]` all of them, or a file; `Pairs` the rows of --prompt,
--vs, --answer and --wrong, or a file; a second `Model` is --other. Options: --set NAME=VALUE, read
as the option's own type; an option that is a second set of `Pairs` is the file it lies in.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from underhood.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from underhood.data import Pairs
    from underhood.methods.registry import Method, Parameter

__all__ = ["Given", "data_arguments", "data_flags", "pairs_of", "read_options", "type_name"]

# `Literal["a"] | None` is of the older kind even when it is written the newer way.
_UNIONS = (get_origin(int | None), get_origin(Literal[0] | None))
_FLAGS = {"str": "--prompt", "prompts": "--prompt", "Pairs": "--prompt --vs", "Model": "--other"}


@dataclass(frozen=True)
class Given:
    """What the command line says about the data."""

    prompts: Sequence[str] = ()
    contrasts: Sequence[str] = ()
    answers: Sequence[str] = ()
    wrong: Sequence[str] = ()
    file: Path | None = None
    other: Callable[[], Any] | None = None


def data_arguments(method: "Method", given: Given) -> dict[str, Any]:
    """Values for the method's data parameters.

    Raises:
        UsageError: Something needed is missing, given in vain, or not a thing of words.
        FileProblem: The file cannot be read.
    """
    found: dict[str, Any] = {}
    kinds = set()
    for parameter in (p for p in method.parameters if not p.option):
        kind = _kind(parameter.type)
        kinds.add(kind)
        value = _DATA[kind](given) if kind in _DATA else None
        if value is not None:
            found[parameter.name] = value
        elif parameter.default is _required():
            raise _missing(method, parameter, kind, given)
    _refuse_idle(method, kinds, given)
    return found


def data_flags(parameter: "Parameter") -> str:
    """The options that give a data parameter; empty when only Python can."""
    return _FLAGS.get(_kind(parameter.type), "")


def _kind(annotation: Any) -> str:
    from underhood.core.model import Model
    from underhood.data import Pairs

    # The richest reading of a union: `str | list[str]` takes several prompts.
    leaves = [a for a in _members(annotation) if a is not type(None)]
    for name, cls in (("Pairs", Pairs), ("Model", Model)):
        if cls in leaves:
            return name
    if any(get_origin(a) in (list, Sequence, tuple) and str in get_args(a) for a in leaves):
        return "prompts"
    return "str" if str in leaves else ""


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in _UNIONS else (annotation,)


def _required() -> Any:
    from underhood.methods.registry import REQUIRED

    return REQUIRED


def _prompts(given: Given) -> list[str] | None:
    if given.file is not None:
        from underhood.data import load_prompts

        return [*given.prompts, *load_prompts(given.file)]
    return list(given.prompts) or None


def _prompt(given: Given) -> str | None:
    prompts = _prompts(given)
    if prompts is not None and len(prompts) > 1:
        raise UsageError(
            "this method reads one prompt", given=f"{len(prompts)} prompts", do="give one"
        )
    return prompts[0] if prompts else None


def pairs_of(given: Given) -> "Pairs | None":
    """Rows of prompts, contrasts and answers, or a file of them; None where there are none."""
    from underhood.data import Pairs

    if given.file is not None:
        if [*given.prompts, *given.contrasts, *given.answers, *given.wrong]:
            raise UsageError(
                "pairs come from a file, or from --prompt, --vs, --answer and --wrong",
                given=f"--data {given.file}, and more besides",
                do="leave one of them out",
            )
        return Pairs.load(given.file)
    if not given.prompts or not given.contrasts:
        return None
    single = len(given.prompts) == len(given.contrasts) == 1
    if single:
        answers, wrong = list(given.answers) or None, list(given.wrong) or None
        return Pairs(given.prompts[0], given.contrasts[0], answers, wrong)
    return Pairs(
        list(given.prompts), list(given.contrasts), list(given.answers) or None,
        list(given.wrong) or None,
    )  # fmt: skip


_DATA: dict[str, Callable[[Given], Any]] = {
    "str": _prompt,
    "prompts": _prompts,
    "Pairs": pairs_of,
    "Model": lambda given: given.other() if given.other is not None else None,
}


def _missing(method: "Method", parameter: "Parameter", kind: str, given: Given) -> UsageError:
    if not kind:
        return UsageError(
            f"{method.name} needs {parameter.name!r}, which a command line cannot give",
            given=type_name(parameter.type),
            why=parameter.about or None,
            do=f"call it from Python: uh.{method.family}.{method.name}(model, ...)",
        )
    half = {"--prompt": given.prompts, "--vs": given.contrasts}
    what = ", ".join(flag for flag, values in half.items() if values) or "no data"
    do = {
        "str": "give it: --prompt TEXT",
        "prompts": "give them: --prompt TEXT (again and again), or --data FILE",
        "Pairs": "give --prompt TEXT and --vs CONTRAST of as many tokens, or --data FILE",
        "Model": "give the second model: --other NAME",
    }[kind]
    return UsageError(f"{method.name} needs {parameter.name!r}", given=what, do=do)


def _refuse_idle(method: "Method", kinds: set[str], given: Given) -> None:
    """Nothing that was typed may be dropped."""
    pairs, text = "Pairs" in kinds, bool(kinds & {"Pairs", "str", "prompts"})
    idle = {
        "--prompt": given.prompts and not text,
        "--data": given.file and not text,
        "--vs": given.contrasts and not pairs,
        "--answer": given.answers and not pairs,
        "--wrong": given.wrong and not pairs,
        "--other": given.other and "Model" not in kinds,
    }
    options = {f"--{p.name}" for p in method.parameters if p.option}
    for flag in (name for name, is_idle in idle.items() if is_idle):
        how = f"write --set {flag[2:]}=VALUE" if flag in options else "leave it out"
        raise UsageError(
            f"{method.name} has no use for {flag}",
            given=flag,
            do=f"{how}; `underhood methods {method.name}` says what the method reads",
        )


def read_options(
    method: "Method", settings: Sequence[str], ready: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`NAME=VALUE` settings as the method's options.

    Args:
        method: The method.
        settings: Options as words.
        ready: Options that are values already, by name.

    Raises:
        UsageError: No such option, a value that is not of its type, or an option that the method
            needs and nobody set.
        FileProblem: A file of pairs that cannot be read.
    """
    known = {p.name: p for p in method.parameters if p.option}
    found: dict[str, Any] = dict(ready or {})
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError(
                "an option is set as NAME=VALUE", given=f"--set {setting}", do="e.g. --set seed=1"
            )
        if name not in known:
            raise UsageError(
                f"{method.name} has no option {name!r}",
                given=f"--set {setting}",
                do=f"nearest: {nearest(name, known)}" if known else "it has no options at all",
            )
        found[name] = _value(known[name], value)
    for name, parameter in known.items():
        if parameter.default is _required() and name not in found:
            kind = "FILE" if _kind(parameter.type) == "Pairs" else "VALUE"
            raise UsageError(
                f"{method.name} needs the option {name!r}",
                given="no --set " + name,
                why=parameter.about or None,
                do=f"give it: --set {name}={kind}",
            )
    return found


def _value(parameter: "Parameter", text: str) -> Any:
    """The text read as the option's type: as None, as it is, as JSON, or as a list with commas."""
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError

    if _kind(parameter.type) == "Pairs":
        return _pairs_option(parameter, text)
    try:
        adapter = TypeAdapter(parameter.type)
    except PydanticSchemaGenerationError as error:
        raise UsageError(
            f"the option {parameter.name!r} cannot be given on a command line",
            given=type_name(parameter.type),
            do="call the method from Python",
        ) from error
    for candidate in _candidates(parameter.type, text):
        try:
            return adapter.validate_python(candidate)
        except ValidationError:
            continue
    raise UsageError(
        f"the option {parameter.name!r} cannot be {text!r}",
        given=f"--set {parameter.name}={text}",
        why=f"it is of type {type_name(parameter.type)}: {parameter.about}".rstrip(": "),
        do=None if _bare(parameter) else f"e.g. --set {parameter.name}={parameter.default}",
    )


def _pairs_option(parameter: "Parameter", text: str) -> "Pairs | None":
    """A set of pairs beside the data: the file that holds it, or none where that is allowed."""
    from underhood.data import Pairs

    if text.lower() in ("none", "null") and type(None) in _members(parameter.type):
        return None
    return Pairs.load(text)


def _bare(parameter: "Parameter") -> bool:
    return parameter.default is None or parameter.default is _required()


def _candidates(annotation: Any, text: str) -> list[Any]:
    readings: list[Any] = []
    if text.lower() in ("none", "null") and type(None) in _members(annotation):
        readings.append(None)
    readings.append(text)
    with suppress(json.JSONDecodeError):
        readings.append(json.loads(text))
    readings.append([part.strip() for part in text.split(",")])
    return readings


def type_name(annotation: Any) -> str:
    """A type as a person would write it."""
    if annotation is type(None):
        return "none"
    if len(members := _members(annotation)) > 1:
        return " | ".join(map(type_name, members))
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin := get_origin(annotation):
        inside = ", ".join("..." if a is ... else type_name(a) for a in get_args(annotation))
        return f"{getattr(origin, '__name__', origin)}[{inside}]"
    return getattr(annotation, "__name__", str(annotation))
