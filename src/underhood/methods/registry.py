"""The registry: what methods there are, and what each one's signature and docstring say.

The folders are the list of names, read without importing anything. A method's card, its command
line and its form all come from the function itself: its first docstring line, its sections
(`Args`, `Cost`, `Source`, `Misleads`), its parameters and their types.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from underhood.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from underhood.view import Result

__all__ = ["FAMILIES", "Method", "Parameter", "find", "method", "names"]

FAMILIES = ("read", "locate", "decompose", "steer", "compare", "develop", "vision")
SECTIONS = ("Args", "Returns", "Raises", "Cost", "Source", "Misleads", "Example")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: its name, type, default (`REQUIRED` if none) and meaning."""

    name: str
    type: Any
    default: Any
    about: str
    option: bool


F = TypeVar("F", bound=Callable[..., Any])

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Method:
    """A method and its card."""

    name: str
    family: str
    function: Callable[..., Any]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def sections(self) -> dict[str, str]:
        """Docstring sections by name; the text before the first one is `""`."""
        doc = inspect.getdoc(self.function) or ""
        parts = re.split(rf"^({'|'.join(SECTIONS)}):[ \t]*", doc, flags=re.MULTILINE)
        found = {"": parts[0].strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            found[name] = inspect.cleandoc(text)
        return found

    @property
    def parameters(self) -> list[Parameter]:
        """Parameters after the model, in order, with types resolved."""
        plain = inspect.unwrap(self.function)
        hints = get_type_hints(plain)
        about = _arguments(self.sections.get("Args", ""))
        found = []
        for name, parameter in list(inspect.signature(plain).parameters.items())[1:]:
            option = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            found.append(
                Parameter(
                    name, hints.get(name, Any), parameter.default, about.get(name, ""), option
                )
            )
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> "Result":
        """Run it."""
        return self.function(*args, **kwargs)


def _arguments(text: str) -> dict[str, str]:
    """`name: meaning` entries of an Args section, continuation lines joined."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"^(\w+): (.*)$", line.rstrip()):
            name = match[1]
            found[name] = match[2]
        elif name and line.startswith(" "):
            found[name] += " " + line.strip()
    return found


def method(function: F) -> F:
    """Mark a function as a method: its result learns which call made it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        family = function.__module__.split(".")[-2]
        python = _python(family, function, args, kwargs)
        made = {"method": f"{family}.{function.__name__}", "call": python} | result.provenance
        view = result.view
        if view.python is None:
            view = view.model_copy(update={"python": made["call"]})
        return replace(result, view=view, provenance=made)

    return call  # type: ignore[return-value]


def _python(family: str, function: Callable[..., Any], args: Any, kwargs: Any) -> str:
    """The call as Python that can be pasted."""
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    parts = ["model"] + [
        f"{name}={_short(value)}" if i else _short(value)
        for i, (name, value) in enumerate(list(bound.items())[1:])
    ]
    model = getattr(next(iter(bound.values())), "name", "")
    return f"model = uh.load({model!r})\nuh.{family}.{function.__name__}({', '.join(parts)})"


def _short(value: Any) -> str:
    own = type(value).__module__.startswith("underhood.")
    text = ("uh." if own else "") + repr(value)
    return text if len(text) < 2000 else text[:2000] + "..."


def names() -> dict[str, list[str]]:
    """Method names by family, read from the folders; imports nothing."""
    root = Path(__file__).parent
    return {family: sorted(p.stem for p in (root / family).glob("[!_]*.py")) for family in FAMILIES}


def find(name: str) -> Method:
    """A method by name (`logit_lens`, or `read.logit_lens`).

    Raises:
        UsageError: No such method; the nearest names are given.
    """
    wanted = name.rpartition(".")[2].replace("-", "_")
    for family, found in names().items():
        if wanted in found:
            module = importlib.import_module(f"underhood.methods.{family}.{wanted}")
            return Method(wanted, family, getattr(module, wanted))
    known = [n for found in names().values() for n in found]
    raise UsageError(
        f"there is no method {name!r}", given=name, do=f"nearest: {nearest(name, known)}"
    )


def gather(family: str, scope: dict[str, Any]) -> list[str]:
    """Put a family's functions into its package's namespace; returns their names."""
    found = names()[family]
    for name in found:
        module = importlib.import_module(f"underhood.methods.{family}.{name}")
        scope[name] = getattr(module, name)
    return found
