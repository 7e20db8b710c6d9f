"""A view: what a result looks like, as a small typed JSON document (`view/1`).

A method returns numbers; a *view* says how to show them: which kind of picture, its labels, its
colour scale, one or two sentences on how to read it, and the control that belongs beside the claim.
The report, the notebook, the terminal and the workbench all draw the same document, and a saved one
can be drawn again later without the model.

There are nine kinds (`sentences tokens grid bars heads lines table texts group`), told apart by the
field `kind`. Numbers are plain floats, with None where there is none: NaN and infinities become
None on the way in, so a view is always valid JSON. Use the builders (`underhood.view.grid`, ...)
rather than the classes: they take arrays and refuse wrong shapes with a reason.

The file carries `"schema": "view/1"`. Fields that this version does not know are ignored; a file of
a newer schema, or a truncated one, is a `FileProblem`.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    model_serializer,
    model_validator,
)
from pydantic import ValidationError as _Invalid

from underhood.core.errors import FileProblem, nearest
from underhood.view.clean import clean
from underhood.view.colour import Scale
from underhood.view.schema import check_schema, first_reason, parse_json

SCHEMA = "view/1"

_FORMAT = re.compile(r"[+]?,?(\.\d{1,2})?[defg%]?")


Number: TypeAlias = float | None
_Numbers = Annotated[list[Number], BeforeValidator(clean)]
_Matrix = Annotated[list[list[Number]], BeforeValidator(clean)]
_Labels = Annotated[list[str], BeforeValidator(lambda v: [str(item) for item in v])]
_Span = tuple[float, float] | None


def _same(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{what}: {found} given, {expected} expected")


class View(BaseModel, frozen=True):
    """What every kind has. Not made directly: use a builder, or `View.from_json`.

    Attributes:
        title: a few words.
        about: how to read it, and when it misleads: one or two sentences.
        control: the view that shows what chance, or the unaltered model, gives; drawn beside.
        provenance: where the numbers come from (model, revision, dtype, device, seed, date, ...).
        python: the call that made it.
    """

    model_config = ConfigDict(extra="ignore", defer_build=True)

    kind: str
    title: str = ""
    about: str = ""
    control: "AnyView | None" = None
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
        if not isinstance(document, dict):
            raise FileProblem(
                "this is not a view document",
                given=f"{where}: {type(document).__name__}",
                do="save one with View.save('x.json')",
            )
        check_schema(document.get("schema"), SCHEMA, where)
        kind = document.get("kind")
        if kind not in KINDS:
            raise FileProblem(
                f"no view has the kind {kind!r}",
                given=where,
                why=f"the kinds are {', '.join(KINDS)}",
                do=f"nearest: {nearest(str(kind), KINDS)}",
            )
        try:
            return _adapter().validate_python(document)
        except _Invalid as problem:
            raise FileProblem(
                "the fields of this view do not fit its kind",
                given=where,
                why=first_reason(problem),
                do="write the file again with View.save",
            ) from None

    @staticmethod
    def from_json(text: str | bytes, *, where: str = "a view") -> "View":
        """The view in JSON text.

        Raises:
            FileProblem: not JSON (truncated?), or not a view that this version can read.
        """
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
        """Write it as the suffix says: `.html`, `.json`, `.csv`, `.txt`, and `.png` for grids.

        Raises:
            UsageError: another suffix, or `.png` for a kind that is not a grid.
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


class Sentences(View, frozen=True):
    """Plain statements, each with its number in it."""

    kind: Literal["sentences"] = "sentences"
    items: _Labels


class Tokens(View, frozen=True):
    """A strip of tokens, coloured by one value each (None: not coloured)."""

    kind: Literal["tokens"] = "tokens"
    tokens: _Labels
    values: _Numbers | None = None
    unit: str = ""
    scale: Scale = "diverging"
    limit: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "Tokens":
        if self.values is not None:
            _same("values", len(self.values), len(self.tokens))
        return self


class Grid(View, frozen=True):
    """A heat map. `values[r][c]`; None is drawn hatched; `marks` are outlined cells (row, col)."""

    kind: Literal["grid"] = "grid"
    rows: _Labels
    cols: _Labels
    values: _Matrix
    row_name: str = ""
    col_name: str = ""
    cell_text: list[list[str]] | None = None
    scale: Scale = "diverging"
    limit: float | None = Field(default=None, gt=0)
    unit: str = ""
    marks: list[tuple[int, int]] = []

    @model_validator(mode="after")
    def _fits(self) -> "Grid":
        for name, matrix in (("values", self.values), ("cell_text", self.cell_text)):
            if matrix is not None:
                _same(f"rows of {name}", len(matrix), len(self.rows))
                for line in matrix:
                    _same(f"columns of {name}", len(line), len(self.cols))
        for r, c in self.marks:
            if not (0 <= r < len(self.rows) and 0 <= c < len(self.cols)):
                raise ValueError(f"mark ({r}, {c}) lies outside {len(self.rows)}x{len(self.cols)}")
        return self


class Bars(View, frozen=True):
    """Signed bars. `baseline` is the interval that chance gives, per bar, drawn behind it."""

    kind: Literal["bars"] = "bars"
    labels: _Labels
    values: _Numbers
    unit: str = ""
    signed: bool = True
    total: float | None = None
    total_label: str = ""
    baseline: list[tuple[Number, Number]] | None = None
    baseline_name: str = "random baseline"
    span: _Span = None

    @model_validator(mode="after")
    def _fits(self) -> "Bars":
        _same("values", len(self.values), len(self.labels))
        if self.baseline is not None:
            _same("baseline intervals", len(self.baseline), len(self.labels))
        return self


class Head(BaseModel, frozen=True):
    """One attention pattern: `pattern[query][key]`, None where masked."""

    model_config = ConfigDict(extra="ignore")

    label: str
    pattern: _Matrix
    note: str = ""


class Heads(View, frozen=True):
    """Attention patterns of several heads over the same tokens."""

    kind: Literal["heads"] = "heads"
    heads: list[Head]
    tokens: _Labels

    @model_validator(mode="after")
    def _fits(self) -> "Heads":
        for head in self.heads:
            _same(f"queries of {head.label}", len(head.pattern), len(self.tokens))
            for line in head.pattern:
                _same(f"keys of {head.label}", len(line), len(self.tokens))
        return self


class Series(BaseModel, frozen=True):
    """One line of a `Lines` view; `low` and `high` bound a shaded band."""

    model_config = ConfigDict(extra="ignore")

    name: str
    values: _Numbers
    low: _Numbers | None = None
    high: _Numbers | None = None


class Lines(View, frozen=True):
    """Curves over common, equally spaced x labels."""

    kind: Literal["lines"] = "lines"
    x: _Labels
    series: list[Series]
    x_name: str = ""
    y_name: str = ""
    span: _Span = None

    @model_validator(mode="after")
    def _fits(self) -> "Lines":
        for line in self.series:
            for name in ("values", "low", "high"):
                numbers = getattr(line, name)
                if numbers is not None:
                    _same(f"{name} of {line.name}", len(numbers), len(self.x))
            if (line.low is None) != (line.high is None):
                raise ValueError(f"series {line.name}: low and high go together")
        return self


class Column(BaseModel, frozen=True):
    """One column of a `Table`: `format` is a Python number format such as `+.2f` or `.1%`."""

    model_config = ConfigDict(extra="ignore")

    name: str
    unit: str = ""
    format: str = ""

    @model_validator(mode="after")
    def _fits(self) -> "Column":
        if not _FORMAT.fullmatch(self.format):
            raise ValueError(f"column {self.name}: format {self.format!r} is not like '+.2f'")
        return self


Cell: TypeAlias = bool | int | float | str | None


class Table(View, frozen=True):
    """Rows of text and numbers under named columns."""

    kind: Literal["table"] = "table"
    columns: list[Column]
    rows: Annotated[list[list[Cell]], BeforeValidator(clean)]

    @model_validator(mode="after")
    def _fits(self) -> "Table":
        for line in self.rows:
            _same("cells of a row", len(line), len(self.columns))
        return self


class Text(BaseModel, frozen=True):
    """One column of a `Texts` view; `values` are probabilities, one per token."""

    model_config = ConfigDict(extra="ignore")

    label: str
    tokens: _Labels
    note: str = ""
    values: _Numbers | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Text":
        if self.values is not None:
            _same(f"values of {self.label}", len(self.values), len(self.tokens))
        return self


class Texts(View, frozen=True):
    """Texts side by side, each token underlined by its probability."""

    kind: Literal["texts"] = "texts"
    columns: list[Text]


class Group(View, frozen=True):
    """Views under one title; `folded` ones are closed until the reader opens them."""

    kind: Literal["group"] = "group"
    views: "list[AnyView]"
    folded: bool = False


if TYPE_CHECKING:
    AnyView: TypeAlias = View
else:
    AnyView = Annotated[
        Sentences | Tokens | Grid | Bars | Heads | Lines | Table | Texts | Group,
        Field(discriminator="kind"),
    ]

_CLASSES = (Sentences, Tokens, Grid, Bars, Heads, Lines, Table, Texts, Group)
KINDS: tuple[str, ...] = tuple(cls.model_fields["kind"].default for cls in _CLASSES)


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(AnyView)
