"""The base of every view kind: what all of them have, and how they are written and shown.

The kinds themselves are in `kinds` and `panels`; `doc` lists them and reads documents.
"""

import json
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    model_serializer,
)

from underhood.view.clean import clean

SCHEMA = "view/1"

Axis: TypeAlias = Literal["layer", "pos", "head", "feature"]
"""What panels that stand beside each other can select together."""

Number: TypeAlias = float | None
Cleaned = Annotated[Number, BeforeValidator(clean)]
Numbers = Annotated[list[Number], BeforeValidator(clean)]
Matrix = Annotated[list[list[Number]], BeforeValidator(clean)]
Labels = Annotated[list[str], BeforeValidator(lambda v: [str(item) for item in v])]
Facts = Annotated[dict[str, Number], BeforeValidator(clean)]
"""A few numbers by name, in reading order: the header of a panel."""
Places: TypeAlias = dict[Axis, list[int | None]]
"""What each row (column, bar) is on the shared axes: `{"layer": [0, 1, 2]}`."""
Span: TypeAlias = tuple[float, float] | None


def same(what: str, found: int, expected: int) -> None:
    """Refuse a list of the wrong length (pydantic tells the reader)."""
    if found != expected:
        raise ValueError(f"{what}: {found} given, {expected} expected")


class _AnyKind:
    """Reads a view of any kind. The kinds are made from `View`, so they are looked up late."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        from underhood.view.doc import EVERY

        return handler.generate_schema(EVERY)


if TYPE_CHECKING:
    AnyView: TypeAlias = "View"
else:
    AnyView = Annotated[Any, _AnyKind()]


class Part(BaseModel, frozen=True):
    """A piece of a view that is no view by itself."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, defer_build=True)


class View(BaseModel, frozen=True):
    """What every kind has. Not made directly: use a builder, or `View.from_json`.

    Attributes:
        title: a few words.
        about: how to read it, and when it misleads: one or two sentences.
        control: the view that shows what chance, or the unaltered model, gives; drawn beside.
        provenance: where the numbers come from (model, revision, dtype, device, seed, date, ...).
        python: the call that made it.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, defer_build=True)

    kind: str
    title: str = ""
    about: str = ""
    control: AnyView | None = None
    provenance: Annotated[dict[str, Any] | None, BeforeValidator(clean)] = None
    python: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document as plain Python, `schema` first; fields at their default are left out."""
        return {"schema": SCHEMA, **self.model_dump(exclude_defaults=True)}

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # The kind equals its default, which is left out elsewhere; the reader needs it.
        return {"kind": self.kind, **handler(self)}

    def to_json(self, *, indent: int | None = None) -> str:
        """The document as JSON text; `View.from_json` reads it back to an equal view."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)

    @staticmethod
    def from_dict(document: Any, *, where: str = "a view") -> "View":
        """The view in an already parsed document.

        Args:
            document: as `to_dict` returns.
            where: what the errors call it, e.g. the file's name.

        Raises:
            FileProblem: the schema is missing or newer, the kind is unknown, or fields do not fit.
        """
        from underhood.view.doc import read

        return read(document, where)

    @staticmethod
    def from_json(text: str | bytes, *, where: str = "a view") -> "View":
        """The view in JSON text.

        Raises:
            FileProblem: not JSON (truncated?), or not a view that this version can read.
        """
        from underhood.view.schema import parse_json

        return View.from_dict(parse_json(text, where), where=where)

    def html(self, *, level: int = 3) -> str:
        """The view as a self-contained HTML fragment (with its style, without JavaScript)."""
        from underhood.view.html import fragment

        return fragment(self, level=level)

    def text(self) -> Any:
        """The view as a rich renderable, for `rich.console.Console().print`."""
        from underhood.view.text import to_text

        return to_text(self)

    def show(self) -> None:
        """Display it: as HTML in a notebook, as text in a terminal."""
        from underhood.view.save import show

        show(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as the suffix says: `.html`, `.json`, `.csv`, `.txt`, and `.png` for pictures.

        Raises:
            UsageError: another suffix, or `.png` for a kind that is no picture.
            FileProblem: the place cannot be written to.
        """
        from underhood.view.save import save

        save(self, path)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from underhood.view.text import to_string

        return {"text/plain": to_string(self), "text/html": self.html()}

    def __repr__(self) -> str:
        # The document can hold a hundred thousand numbers; a traceback must not print them.
        return f"<{self.kind} view {self.title!r}>"
