"""One small function per kind of view: takes arrays or lists, returns the document.

Every builder takes the same keyword arguments besides its own: `title`, `about` (how to read it,
and when it misleads), `control` (the view that shows what chance gives), `provenance` and `python`.
Data may be numpy arrays, xarray arrays, CPU tensors or nested lists. Data that do not fit together
are a `UsageError` that says which number was expected.

Example:
    >>> view = grid([[0.1, -0.4]], rows=["layer 0"], cols=[" Mary", " John"], title="Effect")
    >>> View.from_json(view.to_json()) == view
    True
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import (
    Any,
    Protocol,
    SupportsFloat,
    SupportsInt,
    TypedDict,
    TypeVar,
    Unpack,
    runtime_checkable,
)

import numpy as np
from pydantic import ValidationError

from underhood.core.errors import UsageError
from underhood.view.clean import clean
from underhood.view.colour import Scale
from underhood.view.doc import (
    Axis,
    Bars,
    Candidates,
    Grid,
    Group,
    Head,
    Heads,
    Lines,
    Measure,
    Part,
    Sentences,
    Series,
    Table,
    Text,
    Texts,
    Tokens,
    View,
)
from underhood.view.schema import first_reason


@runtime_checkable
class HasArray(Protocol):
    """Anything numpy can read: an array, a DataArray, a tensor on the CPU."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


Numbers = HasArray | Sequence[Any]
"""An array or (nested) sequence of numbers; None and NaN mean "no value"."""

Places = Mapping[Axis, Iterable[SupportsInt | None]]
"""Numbers of rows or columns on the shared axes."""


class Common(TypedDict, total=False):
    """What every builder takes.

    Attributes:
        title: a few words.
        about: how to read it, and when it misleads.
        control: drawn beside the claim, on the same scale.
        provenance: where the numbers come from.
        python: the call that made it.
    """

    title: str
    about: str
    control: View | None
    provenance: dict[str, Any] | None
    python: str | None


_V = TypeVar("_V", bound=View)


def make(kind: type[_V], common: Common, **fields: Any) -> _V:
    """The view, or a `UsageError` with the first reason why these fields make none."""
    try:
        return kind(**fields, **common)
    except ValidationError as problem:
        raise UsageError(
            f"these data do not make a {kind.__name__.lower()} view",
            why=first_reason(problem),
            do=f"see help(underhood.view.{kind.__name__.lower()})",
        ) from None


def _matrix(values: Numbers) -> list[Any]:
    nested = clean(values)
    if any(not isinstance(row, list) for row in nested):
        shape = getattr(values, "shape", f"{len(nested)} numbers")
        raise UsageError("a matrix was expected", given=shape, do="pass values [rows, cols]")
    return nested


def ends(span: tuple[SupportsFloat, SupportsFloat] | None) -> tuple[float, float] | None:
    """The ends of an axis as plain floats."""
    return None if span is None else (float(span[0]), float(span[1]))


def sentences(items: Iterable[str], **common: Unpack[Common]) -> Sentences:
    """Plain statements, each with its number in it."""
    return make(Sentences, common, items=list(items))


def tokens(
    tokens: Iterable[str],
    values: Numbers | None = None,
    *,
    unit: str = "",
    scale: Scale = "diverging",
    limit: SupportsFloat | None = None,
    **common: Unpack[Common],
) -> Tokens:
    """A strip of tokens, coloured by one value each.

    Args:
        tokens: decoded text per token, `[pos]`.
        values: `[pos]` in `unit`; missing ones are not coloured.
        unit: of the values, as `logits`.
        scale: the colour map.
        limit: value at the end of the scale; None takes the robust limit.
        **common: see `Common`.
    """
    return make(
        Tokens,
        common,
        tokens=list(tokens),
        values=None if values is None else clean(values),
        unit=unit,
        scale=scale,
        limit=None if limit is None else float(limit),
    )


def grid(
    values: Numbers,
    *,
    rows: Iterable[Any],
    cols: Iterable[Any],
    row_name: str = "",
    col_name: str = "",
    row_at: Places | None = None,
    col_at: Places | None = None,
    text: Sequence[Sequence[str]] | None = None,
    scale: Scale = "diverging",
    limit: SupportsFloat | None = None,
    unit: str = "",
    marks: Iterable[tuple[int, int]] = (),
    measures: Iterable[Measure | Mapping[str, Any]] = (),
    candidates: Candidates | Mapping[str, Any] | None = None,
    **common: Unpack[Common],
) -> Grid:
    """A heat map.

    Args:
        values: `[rows, cols]` in `unit`; None and NaN are hatched.
        rows: one label per row, top first (layers, heads, ...).
        cols: one label per column (tokens are shown with their white space).
        row_name: what a row is, as `layer`.
        col_name: what a column is, as `pos`.
        row_at: number of each row on the axes that panels select together, as
            `{"layer": [-1, 0, 1]}`. Needed only where name and labels do not tell: `layer` and
            `3`, `head` and `3.5` do, and tokens count from 0.
        col_at: the same for columns, as `{"pos": [4, 7]}`.
        text: written in the cells, `[rows, cols]`, with the value below it.
        scale: the colour map.
        limit: magnitude at the end of the scale; None takes the robust limit and says so when
            values lie beyond it.
        unit: of the values.
        marks: (row, col) of cells to outline.
        measures: other numbers to colour by: mappings with `name`, `values`, and optionally `unit`,
            `scale` (without one: sequential) and `limit`.
        candidates: what else could stand in the cells: `tokens`, and `ids` and `values`
            `[row, col, rank]`.
        **common: see `Common`.

    Raises:
        UsageError: the labels, texts or marks do not fit the matrix.
    """
    return make(
        Grid,
        common,
        values=_matrix(values),
        rows=list(rows),
        cols=list(cols),
        row_name=row_name,
        col_name=col_name,
        row_at=_places(row_at),
        col_at=_places(col_at),
        cell_text=None if text is None else [[str(cell) for cell in line] for line in text],
        scale=scale,
        limit=None if limit is None else float(limit),
        unit=unit,
        marks=[(int(r), int(c)) for r, c in marks],
        measures=[_part(measure) for measure in measures],
        candidates=None if candidates is None else _part(candidates),
    )


def _part(given: Part | Mapping[str, Any]) -> Any:
    """A piece of a view as it is, or its fields."""
    return given if isinstance(given, Part) else clean(dict(given))


def _places(at: Places | None) -> dict[Axis, list[int | None]]:
    """Numbers on the shared axes as the document holds them."""
    return {k: [None if n is None else int(n) for n in v] for k, v in (at or {}).items()}


def bars(
    labels: Iterable[Any],
    values: Numbers,
    *,
    unit: str = "",
    signed: bool = True,
    total: SupportsFloat | None = None,
    total_label: str = "sum",
    baseline: Numbers | None = None,
    baseline_name: str = "random baseline",
    span: tuple[SupportsFloat, SupportsFloat] | None = None,
    **common: Unpack[Common],
) -> Bars:
    """Signed bars, in the order given.

    Args:
        labels: one per bar.
        values: `[bar]` in `unit`.
        unit: of the values.
        signed: print `+`; False for probabilities and other amounts, which are never negative.
        total: shown below a rule, e.g. the sum that the parts must reach.
        total_label: what that number is.
        baseline: what chance gives: `[bar]` or an interval `[bar, 2]` (low, high).
        baseline_name: what the baseline is.
        span: the ends of the axis; None fits the data.
        **common: see `Common`.
    """
    pairs = None
    if baseline is not None:
        pairs = [tuple(b) if isinstance(b, list) else (b, b) for b in clean(baseline)]
    return make(
        Bars,
        common,
        labels=list(labels),
        values=clean(values),
        unit=unit,
        signed=signed,
        total=None if total is None else clean(float(total)),
        total_label=total_label if total is not None else "",
        baseline=pairs,
        baseline_name=baseline_name,
        span=ends(span),
    )


def heads(
    tokens: Iterable[str],
    patterns: Mapping[str, Numbers] | Sequence[Head],
    *,
    notes: Mapping[str, str] | None = None,
    **common: Unpack[Common],
) -> Heads:
    """Attention patterns of several heads over the same tokens.

    Args:
        tokens: decoded text per token, `[pos]`.
        patterns: per head label, `[query, key]` probabilities. Cells above the diagonal that hold
            exactly zero are masked, and drawn blank.
        notes: per head label, a short remark (its score, its role).
        **common: see `Common`.
    """
    if isinstance(patterns, Mapping):
        known = notes or {}
        listed = [
            Head(label=str(label), pattern=_causal(pattern), note=known.get(label, ""))
            for label, pattern in patterns.items()
        ]
    else:
        listed = list(patterns)
    return make(Heads, common, tokens=list(tokens), heads=listed)


def _causal(pattern: Numbers) -> list[list[float | None]]:
    """The pattern with its upper triangle blank, if that triangle is all zero (or already None)."""
    data = np.asarray(pattern, dtype=float)
    upper = np.triu(np.ones(data.shape[-2:], dtype=bool), 1)
    if data.ndim == 2 and not np.nan_to_num(data)[upper].any():
        data = np.where(upper, np.nan, data)
    return _matrix(data)


def lines(
    x: Iterable[Any],
    series: Mapping[str, Numbers] | Sequence[Series],
    *,
    x_name: str = "",
    y_name: str = "",
    bands: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    span: tuple[SupportsFloat, SupportsFloat] | None = None,
    **common: Unpack[Common],
) -> Lines:
    """Curves over common, equally spaced x labels.

    Args:
        x: one label per point.
        series: per name, `[x]`; missing values break the line.
        x_name: what x is, with its unit.
        y_name: what y is, with its unit.
        bands: per name, (low, high), each `[x]`: a shaded interval around the line.
        span: the ends of the y axis; None fits the data.
        **common: see `Common`.
    """
    return make(
        Lines, common, x=list(x), series=listed_series(series, bands), x_name=x_name,
        y_name=y_name, span=ends(span),
    )  # fmt: skip


def listed_series(
    series: Mapping[str, Numbers] | Sequence[Series],
    bands: Mapping[str, tuple[Numbers, Numbers]] | None,
) -> list[Series]:
    """Series by name, with their bands, as the document holds them."""
    if not isinstance(series, Mapping):
        return list(series)
    found = []
    for name, values in series.items():
        low, high = (bands or {}).get(name, (None, None))
        found.append(
            Series(
                name=str(name),
                values=clean(values),
                low=None if low is None else clean(low),
                high=None if high is None else clean(high),
            )
        )
    return found


def table(columns: Iterable[Any], rows: Iterable[Sequence[Any]], **common: Unpack[Common]) -> Table:
    """Rows of text and numbers.

    Args:
        columns: names, or `Column`s / mappings with `name`, `unit` and `format` (`+.2f`, `.1%`).
        rows: cells per row: text, numbers, booleans or None.
        **common: see `Common`.
    """
    named = [{"name": c} if isinstance(c, str) else c for c in columns]
    return make(Table, common, columns=named, rows=[clean(list(row)) for row in rows])


def texts(columns: Iterable[Text | Mapping[str, Any]], **common: Unpack[Common]) -> Texts:
    """Texts side by side.

    Args:
        columns: `Text`s or mappings with `label`, `tokens`, and optionally `note` and `values`
            (the probability of each token).
        **common: see `Common`.
    """
    return make(Texts, common, columns=[c if isinstance(c, Text) else dict(c) for c in columns])


def group(views: Iterable[View], *, folded: bool = False, **common: Unpack[Common]) -> Group:
    """Views under one title.

    Args:
        views: in reading order.
        folded: closed until the reader opens it; for detail.
        **common: see `Common`.
    """
    return make(Group, common, views=list(views), folded=folded)
