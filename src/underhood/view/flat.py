"""A view as plain rows and columns: for CSV, TSV, and the table that a screen reader finds.

One function decides what "the numbers of this view" are, so the file that is saved, the hidden
table behind a picture and the tests all speak of the same cells.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from underhood.view.doc import (
    Bars,
    Bench,
    Branch,
    Diff,
    Feature,
    Graph,
    Grid,
    Group,
    Heads,
    Lines,
    Picture,
    Sentences,
    Series,
    Table,
    Texts,
    Timeline,
    Tokens,
    Tree,
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
            yield from _grid(view)
        case Bars():
            yield _bars(view)
        case Heads():
            for head in view.heads:
                rows = [[t, *line] for t, line in zip(view.tokens, head.pattern, strict=True)]
                yield Flat(f"{view.title}: {head.label}", ["query / key", *view.tokens], rows)
        case Lines():
            yield _curves(view.title, {view.x_name or "x": view.x}, view.series)
        case Table():
            header = [c.name + (f" ({c.unit})" if c.unit else "") for c in view.columns]
            yield Flat(view.title, header, [list(row) for row in view.rows])
        case Texts():
            for column in view.columns:
                values = column.values or [None] * len(column.tokens)
                body = [[t, v] for t, v in zip(column.tokens, values, strict=True)]
                yield Flat(f"{view.title}: {column.label}", ["token", "probability"], body)
        case Timeline():
            x: dict[str, Sequence[Cell]] = {view.x_name or "step": view.steps}
            x |= {"token": view.tokens} if view.tokens else {}
            yield _curves(view.title, x, view.series)
            if view.marks:
                yield Flat(f"{view.title}: marks", ["mark", "step"],
                           [[m.label, m.step] for m in view.marks])  # fmt: skip
        case Graph():
            yield from _graph(view)
        case Tree():
            header = ["module", "class", "alike", "parameters", "shapes", "sites"]
            yield Flat(view.title, header, list(_modules(view.root)))
        case Picture():
            yield Flat(view.title, ["width", "height", "alt"], [[*view.size, view.alt]])
            if view.grid is not None:
                yield from flatten(view.grid)
        case Feature():
            yield from _feature(view)
        case Bench():
            yield from _bench(view)
        case Diff():
            for name, side in (("A", view.a), ("B", view.b), ("A - B", view.delta)):
                for part in flatten(side.model_copy(update={"control": None})):
                    part.title = ": ".join(t for t in (view.title, name, part.title) if t)
                    yield part
        case Group():
            for inner in view.views:
                yield from flatten(inner)
    if view.control is not None:
        for part in flatten(view.control):
            part.title = f"control: {part.title}"
            yield part


def _grid(view: Grid) -> Iterator[Flat]:
    header = [f"{view.row_name or 'row'} / {view.col_name or 'column'}", *view.cols]
    named = [(view.title, view.values)]
    named += [(f"{view.title}: {m.name} {m.unit}".rstrip(), m.values) for m in view.measures]
    for title, values in named:
        yield Flat(title, header, [[r, *line] for r, line in zip(view.rows, values, strict=True)])
    if view.candidates is None:
        return
    tokens, ids, values = view.candidates.tokens, view.candidates.ids, view.candidates.values
    yield Flat(
        f"{view.title}: candidates",
        [view.row_name or "row", view.col_name or "column", "rank", "token", view.unit or "value"],
        [
            [row, col, rank, tokens[token], value]
            for r, row in enumerate(view.rows)
            for c, col in enumerate(view.cols)
            for rank, (token, value) in enumerate(zip(ids[r][c], values[r][c], strict=True))
        ],
    )


def _bars(view: Bars) -> Flat:
    header = ["label", view.unit or "value"]
    rows: list[list[Cell]] = [[n, v] for n, v in zip(view.labels, view.values, strict=True)]
    if view.baseline is not None:
        header += [f"{view.baseline_name} low", f"{view.baseline_name} high"]
        rows = [[*row, *pair] for row, pair in zip(rows, view.baseline, strict=True)]
    if view.total is not None:
        rows.append([view.total_label, view.total, *[None] * (len(header) - 2)])
    return Flat(view.title, header, rows)


def _curves(title: str, x: Mapping[str, Sequence[Cell]], series: Sequence[Series]) -> Flat:
    header, columns = list(x), [list(values) for values in x.values()]
    for line in series:
        header.append(line.name)
        columns.append(list[Cell](line.values))
        if line.low is not None and line.high is not None:
            header += [f"{line.name} low", f"{line.name} high"]
            columns += [list[Cell](line.low), list[Cell](line.high)]
    return Flat(title, header, [list(row) for row in zip(*columns, strict=True)])


def _facts(title: str, facts: Mapping[str, Cell]) -> Iterator[Flat]:
    if facts:
        yield Flat(f"{title}: numbers", ["name", "value"], [[k, v] for k, v in facts.items()])


def _graph(view: Graph) -> Iterator[Flat]:
    """Edges first: they are what a reader of the file wants."""
    edges, ids = view.edges, [node.id for node in view.nodes]
    header = ["source", "target", f"weight {view.unit}".rstrip(), "inside", "name"]
    inside = edges.inside or [True] * len(edges.source)
    names = edges.label or [""] * len(edges.source)
    columns = (edges.source, edges.target, edges.weight, inside, names)
    rows: list[list[Cell]] = [
        [ids[a], ids[b], w, i, n] for a, b, w, i, n in zip(*columns, strict=True)
    ]
    yield Flat(f"{view.title}: edges", header, rows)
    header = ["node", "label", view.y_name or "y", view.x_name or "x", "role", "value"]
    yield Flat(
        f"{view.title}: nodes",
        header,
        [[n.id, n.label or n.id, n.y, n.x, n.role, n.value] for n in view.nodes],
    )
    grouped: list[list[Cell]] = [[g.name, name] for g in view.supernodes for name in g.nodes]
    if grouped:
        yield Flat(f"{view.title}: groups", ["group", "node"], grouped)
    if view.pins:
        yield Flat(f"{view.title}: pinned", ["node"], [[name] for name in view.pins])
    yield from _facts(view.title, view.facts)


def _modules(root: Branch) -> Iterator[list[Cell]]:
    """All modules, parents before children; not by recursion, as trees can be deep."""
    waiting = [root]
    while waiting:
        found = waiting.pop()
        shapes = "; ".join(f"{n} {'x'.join(map(str, s))}".rstrip() for n, s in found.shapes.items())
        name = found.path or found.name
        yield [name, found.type, found.many, found.parameters, shapes, " ".join(found.sites)]
        waiting += reversed(found.children)


def _feature(view: Feature) -> Iterator[Flat]:
    header = ["example", "note", "pos", "token", view.unit or "activation"]
    rows: list[list[Cell]] = [
        [number, example.note, pos, token, value]
        for number, example in enumerate(view.examples)
        for pos, (token, value) in enumerate(zip(example.tokens, example.values, strict=True))
    ]
    yield Flat(f"{view.title}: examples", header, rows)
    for name in ("promoted", "suppressed", "neighbours"):
        pairs = getattr(view, name)
        if pairs:
            yield Flat(f"{view.title}: {name}", [name, "value"], [list(pair) for pair in pairs])
    for found in view.histograms:
        rows = [list(row) for row in zip(found.edges, found.edges[1:], found.counts, strict=False)]
        yield Flat(f"{view.title}: {found.name}", ["from", "to", "count"], rows)
    yield from _facts(view.title, view.facts)


def _bench(view: Bench) -> Iterator[Flat]:
    names = list(view.arms[0].effects) if view.arms else []
    header = ["arm", f"strength {view.unit}".rstrip(), "text", *names, "note"]
    rows: list[list[Cell]] = [
        [arm.label, arm.strength, "".join(arm.tokens), *arm.effects.values(), arm.note]
        for arm in view.arms
    ]
    yield Flat(f"{view.title}: arms after {view.prompt!r}", header, rows)
    for arm in view.arms:
        values = arm.values or [None] * len(arm.tokens)
        body: list[list[Cell]] = [[t, v] for t, v in zip(arm.tokens, values, strict=True)]
        yield Flat(f"{view.title}: {arm.label}", ["token", "probability"], body)


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
