"""A view as plain rows and columns: for CSV, TSV, and the table that a screen reader finds.

One function decides what "the numbers of this view" are, so the file that is saved, the hidden
table behind a picture and the tests all speak of the same cells.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

from underhood.view.doc import (
    Bars,
    Grid,
    Group,
    Heads,
    Lines,
    Sentences,
    Table,
    Texts,
    Tokens,
    View,
)

Cell = bool | int | float | str | None


@dataclass(slots=True)
class Flat:
    """One table.

    Attributes:
        title: the title of the view (or of its part).
        header: column names.
        rows: cells, each as long as the header.
    """

    title: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)

    @property
    def cells(self) -> int:
        """How many cells the table has."""
        return len(self.header) * len(self.rows)


def flatten(view: View) -> Iterator[Flat]:
    """The tables of a view, in reading order; controls follow their claim."""
    match view:
        case Sentences():
            yield Flat(view.title, ["sentence"], [[item] for item in view.items])
        case Tokens():
            values = view.values or [None] * len(view.tokens)
            body = [[i, t, v] for i, (t, v) in enumerate(zip(view.tokens, values, strict=True))]
            yield Flat(view.title, ["pos", "token", view.unit or "value"], body)
        case Grid():
            corner = f"{view.row_name or 'row'} / {view.col_name or 'column'}"
            rows = [[r, *line] for r, line in zip(view.rows, view.values, strict=True)]
            yield Flat(view.title, [corner, *view.cols], rows)
        case Bars():
            yield _bars(view)
        case Heads():
            for head in view.heads:
                rows = [[t, *line] for t, line in zip(view.tokens, head.pattern, strict=True)]
                yield Flat(f"{view.title}: {head.label}", ["query / key", *view.tokens], rows)
        case Lines():
            yield _lines(view)
        case Table():
            header = [c.name + (f" ({c.unit})" if c.unit else "") for c in view.columns]
            yield Flat(view.title, header, [list(row) for row in view.rows])
        case Texts():
            for column in view.columns:
                values = column.values or [None] * len(column.tokens)
                body = [[t, v] for t, v in zip(column.tokens, values, strict=True)]
                yield Flat(f"{view.title}: {column.label}", ["token", "probability"], body)
        case Group():
            for inner in view.views:
                yield from flatten(inner)
    if view.control is not None:
        for part in flatten(view.control):
            part.title = f"control: {part.title}"
            yield part


def _bars(view: Bars) -> Flat:
    header = ["label", view.unit or "value"]
    rows: list[list[Cell]] = [[n, v] for n, v in zip(view.labels, view.values, strict=True)]
    if view.baseline is not None:
        header += [f"{view.baseline_name} low", f"{view.baseline_name} high"]
        rows = [[*row, *pair] for row, pair in zip(rows, view.baseline, strict=True)]
    if view.total is not None:
        rows.append([view.total_label, view.total, *[None] * (len(header) - 2)])
    return Flat(view.title, header, rows)


def _lines(view: Lines) -> Flat:
    header, columns = [view.x_name or "x"], [list[Cell](view.x)]
    for line in view.series:
        header.append(line.name)
        columns.append(list[Cell](line.values))
        if line.low is not None and line.high is not None:
            header += [f"{line.name} low", f"{line.name} high"]
            columns += [list[Cell](line.low), list[Cell](line.high)]
    return Flat(view.title, header, [list(row) for row in zip(*columns, strict=True)])


def to_csv(view: View) -> str:
    """The tables as CSV with exact numbers; several are parted by an empty line and `# title`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tables = list(flatten(view))
    for number, table in enumerate(tables):
        if len(tables) > 1:
            out.write(("\n" if number else "") + f"# {' '.join(table.title.split())}\n")
        writer.writerow(table.header)
        writer.writerows(table.rows)
    return out.getvalue()
