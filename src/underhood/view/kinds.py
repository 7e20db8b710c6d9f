"""The plain kinds: one list, matrix or table of text and numbers each."""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from underhood.view.base import (
    Labels,
    Matrix,
    Number,
    Numbers,
    Part,
    Places,
    Span,
    View,
    same,
)
from underhood.view.clean import clean
from underhood.view.colour import Scale

_FORMAT = re.compile(r"[+]?,?(\.\d{1,2})?[defg%]?")


class Sentences(View, frozen=True):
    """Plain statements, each with its number in it."""

    kind: Literal["sentences"] = "sentences"
    items: Labels


class Tokens(View, frozen=True):
    """A strip of tokens, coloured by one value each (None: not coloured)."""

    kind: Literal["tokens"] = "tokens"
    tokens: Labels
    values: Numbers | None = None
    unit: str = ""
    scale: Scale = "diverging"
    limit: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "Tokens":
        if self.values is not None:
            same("values", len(self.values), len(self.tokens))
        return self


class Measure(Part, frozen=True):
    """Other numbers of the same cells, by which a reader can colour a `Grid` instead."""

    name: str
    values: Matrix
    unit: str = ""
    scale: Scale = "sequential"
    limit: float | None = Field(default=None, gt=0)


class Candidates(Part, frozen=True):
    """What else could stand in each cell of a `Grid`: a few tokens, the best first.

    Attributes:
        tokens: every token that is named, once. Two may read alike and still differ.
        ids: numbers into `tokens`, `[row][col][rank]`.
        values: the value of each, in the grid's own unit, `[row][col][rank]`.
    """

    tokens: Labels
    ids: list[list[list[int]]]
    values: list[Matrix]

    def check(self, rows: int, cols: int) -> None:
        """Refuse what does not fit a grid of so many rows and columns."""
        for name, cells in (("ids", self.ids), ("values", self.values)):
            same(f"rows of the candidates' {name}", len(cells), rows)
            for line in cells:
                same(f"columns of the candidates' {name}", len(line), cols)
        for ids, values in zip(self.ids, self.values, strict=True):
            for mine, theirs in zip(ids, values, strict=True):
                same("values of a cell's candidates", len(theirs), len(mine))
                if mine and not 0 <= min(mine) <= max(mine) < len(self.tokens):
                    raise ValueError(f"a candidate is none of the {len(self.tokens)} tokens")


class Grid(View, frozen=True):
    """A heat map: `values[r][c]`; None is drawn hatched; `marks` are outlined cells (row, col).

    A lens grid is one with `cell_text` and the scale `probability`; a patch heat map is one whose
    control is drawn beside. `row_at` and `col_at` say what a row or column is on the axes that
    panels select together, as `{"layer": [-1, 0, 1]}`, where name and labels do not tell. A reader
    of the page can colour the cells by other `measures`, and see the `candidates` behind a cell.
    """

    kind: Literal["grid"] = "grid"
    rows: Labels
    cols: Labels
    values: Matrix
    row_name: str = ""
    col_name: str = ""
    row_at: Places = {}
    col_at: Places = {}
    cell_text: list[list[str]] | None = None
    scale: Scale = "diverging"
    limit: float | None = Field(default=None, gt=0)
    unit: str = ""
    marks: list[tuple[int, int]] = []
    measures: list[Measure] = []
    candidates: Candidates | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Grid":
        matrices = [("values", self.values), ("cell_text", self.cell_text)]
        for name, matrix in [*matrices, *((m.name, m.values) for m in self.measures)]:
            if matrix is not None:
                same(f"rows of {name}", len(matrix), len(self.rows))
                for line in matrix:
                    same(f"columns of {name}", len(line), len(self.cols))
        for side, places, labels in (
            ("rows", self.row_at, self.rows),
            ("columns", self.col_at, self.cols),
        ):
            for axis, numbers in places.items():
                same(f"{axis} of the {side}", len(numbers), len(labels))
        for r, c in self.marks:
            if not (0 <= r < len(self.rows) and 0 <= c < len(self.cols)):
                raise ValueError(f"mark ({r}, {c}) lies outside {len(self.rows)}x{len(self.cols)}")
        if self.candidates is not None:
            self.candidates.check(len(self.rows), len(self.cols))
        return self


class Bars(View, frozen=True):
    """Signed bars. `baseline` is the interval that chance gives, per bar, drawn behind it."""

    kind: Literal["bars"] = "bars"
    labels: Labels
    values: Numbers
    unit: str = ""
    signed: bool = True
    total: float | None = None
    total_label: str = ""
    baseline: list[tuple[Number, Number]] | None = None
    baseline_name: str = "random baseline"
    span: Span = None

    @model_validator(mode="after")
    def _fits(self) -> "Bars":
        same("values", len(self.values), len(self.labels))
        if self.baseline is not None:
            same("baseline intervals", len(self.baseline), len(self.labels))
        return self


class Head(Part, frozen=True):
    """One attention pattern: `pattern[query][key]`, None where masked."""

    label: str
    pattern: Matrix
    note: str = ""


class Heads(View, frozen=True):
    """Attention patterns of several heads over the same tokens."""

    kind: Literal["heads"] = "heads"
    heads: list[Head]
    tokens: Labels

    @model_validator(mode="after")
    def _fits(self) -> "Heads":
        for head in self.heads:
            same(f"queries of {head.label}", len(head.pattern), len(self.tokens))
            for line in head.pattern:
                same(f"keys of {head.label}", len(line), len(self.tokens))
        return self


class Series(Part, frozen=True):
    """One line of a chart; `low` and `high` bound a shaded band."""

    name: str
    values: Numbers
    low: Numbers | None = None
    high: Numbers | None = None

    def check(self, points: int) -> None:
        """Refuse a line that does not have one value per point."""
        for name in ("values", "low", "high"):
            numbers = getattr(self, name)
            if numbers is not None:
                same(f"{name} of {self.name}", len(numbers), points)
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name}: low and high go together")


class Lines(View, frozen=True):
    """Curves over common, equally spaced x labels."""

    kind: Literal["lines"] = "lines"
    x: Labels
    series: list[Series]
    x_name: str = ""
    y_name: str = ""
    span: Span = None

    @model_validator(mode="after")
    def _fits(self) -> "Lines":
        for line in self.series:
            line.check(len(self.x))
        return self


class Column(Part, frozen=True):
    """One column of a `Table`: `format` is a Python number format such as `+.2f` or `.1%`."""

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
            same("cells of a row", len(line), len(self.columns))
        return self


class Text(Part, frozen=True):
    """One column of text; `values` are probabilities, one per token."""

    label: str
    tokens: Labels
    note: str = ""
    values: Numbers | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Text":
        if self.values is not None:
            same(f"values of {self.label}", len(self.values), len(self.tokens))
        return self


class Texts(View, frozen=True):
    """Texts side by side, each token underlined by its probability."""

    kind: Literal["texts"] = "texts"
    columns: list[Text]
