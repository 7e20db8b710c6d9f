"""The kinds that put several things together, in characters; see `text` for the rules."""

from typing import TYPE_CHECKING

from underhood.view.colour import limits_of
from underhood.view.doc import (
    Bars,
    Bench,
    Branch,
    Diff,
    Feature,
    Graph,
    Grid,
    Lines,
    Picture,
    Series,
    Texts,
    Timeline,
    Tokens,
    Tree,
)
from underhood.view.draw_graph import edge_name, extent, strongest_edges
from underhood.view.draw_sides import as_text, effects_table, shared
from underhood.view.draw_tree import shape_text, size
from underhood.view.legend import fact
from underhood.view.markup import visible
from underhood.view.number import decimals_for, show
from underhood.view.supernodes import merged
from underhood.view.text_kinds import (
    bars,
    grid,
    lines,
    paint,
    plain_table,
    table,
    texts,
    tokens,
    under,
    visible_line,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_EDGES = 12
_EXAMPLES = 5
_EXAMPLE_TOKENS = 40
_RANKED = 10
_MODULES = 60  # lines of a module tree


def _numbers(facts: dict[str, float | None]) -> "Text":
    from rich.text import Text

    told = [f"{visible_line(name)} {fact(value)}" for name, value in facts.items()]
    return Text("   ".join(told))


def graph(view: Graph) -> "RenderableType":
    """Header numbers and the strongest edges."""
    from rich.console import Group as Stack
    from rich.text import Text

    view = merged(view)
    shown = strongest_edges(view)[:_EDGES]
    weights = [view.edges.weight[e] for e in shown]
    limits = limits_of(weights, "diverging")
    out = plain_table()
    out.add_column("edge")
    out.add_column(Text(f"weight {visible_line(view.unit)}".rstrip()), justify="right")
    out.add_column("")
    for e, weight in zip(shown, weights, strict=True):
        outside = view.edges.inside is not None and not view.edges.inside[e]
        number = Text(show(weight, decimals_for(weights)), style=paint(weight, limits))
        out.add_row(Text(edge_name(view, e)), number, "outside" if outside else "")
    ends = {n for e in shown for n in (view.edges.source[e], view.edges.target[e])}
    parts: list[RenderableType] = [_numbers(view.facts)] if view.facts else []
    return Stack(*parts, under(out, extent(view, len(shown), len(ends))))


def tree(view: Tree) -> "RenderableType":
    """The modules, indented; the first ones where there are too many."""
    from rich.text import Text

    lines: list[str] = []
    waiting = [(view.root, 0)]
    count = 0
    while waiting:
        found, depth = waiting.pop()
        count += 1
        if len(lines) < _MODULES:
            lines += _module(found, depth)
        waiting += [(child, depth + 1) for child in reversed(found.children)]
    if count > len(lines):
        lines.append(f"... {count - len(lines):,} more modules")
    return Text("\n".join(lines))


def _module(found: Branch, depth: int) -> list[str]:
    parts = [found.name, f"({found.many} alike)" if found.many > 1 else "", found.type]
    parts.append(size(found.parameters) if found.parameters else "")
    parts += [f"{name} {shape_text(shape)}" for name, shape in found.shapes.items()]
    if found.sites:
        more = f" +{len(found.sites) - 3}" if len(found.sites) > 3 else ""
        parts.append(f"[{' '.join(found.sites[:3])}{more}]")
    return ["  " * depth + visible_line("  ".join(part for part in parts if part))]


def picture(view: Picture) -> "RenderableType":
    """The size of the image in words, and its grid."""
    from rich.console import Group as Stack
    from rich.text import Text

    width, height = view.size
    alt = f": {visible_line(view.alt)}" if view.alt else ""
    told = Text(f"an image of {width} by {height} pixels{alt}", style="dim")
    return told if view.grid is None else Stack(told, grid(view.grid))


def feature(view: Feature) -> "RenderableType":
    """Header numbers, top examples, promoted and suppressed tokens, neighbours."""
    from rich.console import Group as Stack
    from rich.text import Text

    limits = limits_of([v for e in view.examples for v in e.values], "sequential")
    parts: list[RenderableType] = [_numbers(view.facts)] if view.facts else []
    for example in view.examples[:_EXAMPLES]:
        note = f"{visible_line(example.note)}: " if example.note else ""
        text = Text(note, style="dim")
        for token, value in zip(example.tokens[:_EXAMPLE_TOKENS], example.values, strict=False):
            text.append(visible(token).replace("·", " "), style=paint(value, limits))
        more = len(example.tokens) - _EXAMPLE_TOKENS
        parts.append(text.append(f" ... {more} more tokens", "dim") if more > 0 else text)
    more = len(view.examples) - _EXAMPLES
    if more > 0:
        parts.append(Text(f"{more} more examples", style="dim"))
    for name, pairs in (
        ("promoted", view.promoted), ("suppressed", view.suppressed),
        ("neighbours", view.neighbours),
    ):  # fmt: skip
        some = pairs[:_RANKED]
        if some:
            ranked = Bars(labels=[label for label, _ in some], values=[v for _, v in some])
            told = f"{name} ({len(some)} of {len(pairs)})"
            parts += [Text(told, style="bold"), bars(ranked)]
    for found in view.histograms:
        told = f"{visible_line(found.name)}, {found.edges[0]:g} to {found.edges[-1]:g}"
        counts = Series(name=told, values=[float(c) for c in found.counts])
        chart = Lines(x=[""] * len(found.counts), series=[counts])
        parts.append(lines(chart))
    return Stack(*parts)


def timeline(view: Timeline) -> "RenderableType":
    """A small curve and its ends, per series; the marks in words."""
    names = view.tokens or [f"{step:g}" for step in view.steps]
    chart = Lines(x=names, series=view.series, x_name=view.x_name, y_name=view.y_name)
    marks = ", ".join(f"{m.label} at {m.step:g}" for m in view.marks)
    return under(lines(chart), marks)


def bench(view: Bench) -> "RenderableType":
    """Prompt, texts, side effects."""
    from rich.console import Group as Stack
    from rich.text import Text

    columns = [as_text(arm, view.unit) for arm in view.arms]
    parts: list[RenderableType] = [
        Text(f"prompt: {visible_line(view.prompt)}"),
        Text(f"tokens are chosen by: {visible_line(view.decoding)}", style="dim"),
        texts(Texts(columns=columns)),
    ]
    effects = effects_table(view)
    return Stack(*parts, table(effects)) if effects.rows else Stack(*parts)


def diff(view: Diff) -> "RenderableType":
    """A, B and A - B, one below the other."""
    from rich.console import Group as Stack
    from rich.text import Text

    parts: list[RenderableType] = []
    for side in (*shared(view), view.delta):
        parts.append(Text(visible_line(side.title), style="italic"))
        parts.append(_side(side))
    return Stack(*parts)


def _side(view: Grid | Tokens) -> "RenderableType":
    return grid(view) if isinstance(view, Grid) else tokens(view)
