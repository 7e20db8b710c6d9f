"""A circuit: rows by layer, edges as curves, the strongest first.

The curves are an SVG that stretches with the page while strokes keep their width; the nodes are
HTML above it, so that their labels have one size everywhere. Only the strongest edges are drawn and
the drawing says how many of how many; the document holds them all.
"""

from collections.abc import Iterable, Sequence

from underhood.view.colour import Limits, cell_colour, ink, limits_of
from underhood.view.doc import Graph, Node
from underhood.view.legend import legend, numbers, swatch_row
from underhood.view.markup import Html, join, tag, token_html, visible
from underhood.view.number import decimals_for, show
from underhood.view.supernodes import merged

DRAWN = 200
"""Edges drawn without a script."""

_LISTED = 12  # edges in words before the rest is folded
_LONE = 400  # nodes drawn when there are no edges
_WIDE, _NARROW = 680.0, 330.0  # pixels that labels are fitted to
_LETTER, _PAD = 6.7, 14.0  # width of a letter of a label, and what a label has around it
_ROW, _LEAST, _MOST = 34, 140, 1100  # height per row of nodes, and of the whole


def graph(view: Graph) -> Html:
    """Header numbers, the picture, what is shown of it, and the strongest edges in words."""
    view = merged(view)
    shown = shown_edges(view)
    parts = [numbers(view.facts)]
    drawn = _drawn_nodes(view, shown)
    if drawn:
        parts.append(_picture(view, shown, drawn))
    parts.append(tag("p", extent(view, len(shown), len(drawn)), cls="uh-note"))
    parts.append(_legend(view, shown, drawn))
    if shown:
        parts.append(_words(view, shown[:_LISTED]))
    if len(shown) > _LISTED:
        told = tag("summary", f"the next {len(shown) - _LISTED} edges")
        parts.append(tag("details", told, _words(view, shown[_LISTED:]), cls="uh-more"))
    return join(parts)


def strongest_edges(view: Graph) -> list[int]:
    """Numbers of the edges: those of the circuit first, then by size of the weight."""
    weight, inside = view.edges.weight, view.edges.inside
    return sorted(
        range(len(weight)),
        key=lambda e: (inside is not None and not inside[e], -abs(weight[e] or 0.0)),
    )


def shown_edges(view: Graph) -> list[int]:
    """The strongest edges, and those between two pinned nodes."""
    order, pins = strongest_edges(view), _pinned(view)
    ends = list(zip(view.edges.source, view.edges.target, strict=True))
    between = [e for e in order[DRAWN:] if pins.issuperset(ends[e])] if pins else []
    return order[:DRAWN] + between


def _pinned(view: Graph) -> set[int]:
    return {n for n, node in enumerate(view.nodes) if node.id in view.pins}


def extent(view: Graph, edges: int, nodes: int) -> str:
    """How much of the graph is seen."""
    here = len(view.edges.source)
    told = f"{edges:,} of {here:,} edges" + (", the strongest" if edges < here else "")
    if view.total is not None and view.total > here:
        told += f" (the whole graph has {view.total:,})"
    if view.edges.inside is not None:
        told += f"; {sum(view.edges.inside):,} belong to the circuit"
    return f"{told}; {nodes:,} of {len(view.nodes):,} nodes."


def edge_name(view: Graph, edge: int) -> str:
    """`a0.h1 → a2.h3`, or the label that the edge has."""
    if view.edges.label is not None:
        return visible(view.edges.label[edge])
    ends = (view.edges.source[edge], view.edges.target[edge])
    return " → ".join(visible(view.nodes[n].label or view.nodes[n].id) for n in ends)


def _drawn_nodes(view: Graph, edges: Sequence[int]) -> dict[int, tuple[float, float]]:
    """The nodes at the ends of the drawn edges, each with its place in percent."""
    ends = {n for e in edges for n in (view.edges.source[e], view.edges.target[e])}
    ends |= _pinned(view)
    chosen = sorted(ends) if view.edges.source else range(min(len(view.nodes), _LONE))
    xs, ys = _columns(view, chosen), [view.nodes[n].y for n in chosen]
    return {
        n: (_spread(view.nodes[n].x, xs, 4.0, 92.0), 100 - _spread(view.nodes[n].y, ys, 4.0, 92.0))
        for n in chosen
    }


def _columns(view: Graph, chosen: Iterable[int]) -> list[float]:
    """What the width must hold: every labelled column, or the drawn nodes."""
    if view.x_labels:
        return [0.0, len(view.x_labels) - 1.0, *(node.x for node in view.nodes)]
    return [view.nodes[n].x for n in chosen]


def _spread(value: float, among: Sequence[float], start: float, width: float) -> float:
    low, high = min(among), max(among)
    return start + width * ((value - low) / (high - low) if high > low else 0.5)


def _picture(view: Graph, edges: Sequence[int], places: dict[int, tuple[float, float]]) -> Html:
    heights = sorted({view.nodes[n].y for n in places})
    height = min(max(_ROW * len(heights), _LEAST), _MOST)
    top = max((abs(view.edges.weight[e] or 0.0) for e in edges), default=0.0) or 1.0
    curves = [_curve(view, e, places, top) for e in reversed(edges)]  # the strongest on top
    svg = tag("svg", *curves, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")
    limits = limits_of([view.nodes[n].value for n in places], "diverging")
    fits = _labelled(view, places)
    fits |= dict.fromkeys(_pinned(view), "")
    nodes = [_node(view, n, place, fits.get(n), limits) for n, place in places.items()]
    rows = [
        tag("span", text, style=f"top:{place:.2f}%") for text, place in _row_labels(view, places)
    ]
    told = f"{view.title or 'graph'}: {len(edges)} edges between {len(places)} nodes"
    plate = tag("div", svg, *nodes, cls="uh-net", style=f"height:{height}px", role="img",
                aria_label=told)  # fmt: skip
    side = max((len(text) for text, _ in _row_labels(view, places)), default=1) + 1
    return tag(
        "div",
        tag("p", f"{view.y_name} ↑" if view.y_name else "", cls="uh-yname"),
        tag("div", *rows, cls="uh-yticks", aria_hidden="true"),
        plate,
        tag("div", *_x_labels(view), cls="uh-across", aria_hidden="true"),
        tag("p", view.x_name, cls="uh-xname"),
        cls="uh-plot uh-graphplot" + ("" if view.x_labels else " uh-noxlabels"),
        style=f"--side:{side}ch",
    )


def _curve(view: Graph, edge: int, places: dict[int, tuple[float, float]], top: float) -> Html:
    weight = view.edges.weight[edge]
    (x0, y0), (x1, y1) = places[view.edges.source[edge]], places[view.edges.target[edge]]
    share = abs(weight or 0.0) / top
    middle = (y0 + y1) / 2
    # Ends on one row would lie on each other: such an edge bows upwards.
    lift = 6 if abs(y0 - y1) < 1 else 0
    bend = f"C{x0:.2f} {middle - lift:.2f} {x1:.2f} {middle - lift:.2f} {x1:.2f} {y1:.2f}"
    outside = view.edges.inside is not None and not view.edges.inside[edge]
    kind = "uh-efalse" if weight is None else ("uh-epos" if weight >= 0 else "uh-eneg")
    return tag(
        "path",
        d=f"M{x0:.2f} {y0:.2f}{bend}",
        cls=f"{kind} uh-out" if outside else kind,
        style=f"stroke-width:{0.75 + 3.25 * share:.2f};opacity:{0.25 + 0.65 * share:.2f}",
    )


def _labelled(view: Graph, places: dict[int, tuple[float, float]]) -> dict[int, str]:
    """Which nodes have room for their label: on any screen (`""`) or on wide ones (`"uh-odd"`)."""
    rows: dict[float, list[int]] = {}
    for n, (_, y) in places.items():
        rows.setdefault(round(y, 1), []).append(n)
    found: dict[int, str] = {}
    for row in rows.values():
        row.sort(key=lambda n: places[n][0])
        for width, mark in ((_WIDE, "uh-odd"), (_NARROW, "")):
            free = float("-inf")
            for n in row:
                half = (_LETTER * len(visible(_name(view.nodes[n]))) + _PAD) / 2
                centre = places[n][0] / 100 * width
                if centre - half >= free:
                    found[n] = mark
                    free = centre + half
    return found


def _name(node: Node) -> str:
    return node.label or node.id


def _node(
    view: Graph, n: int, place: tuple[float, float], fits: str | None, limits: Limits
) -> Html:
    node = view.nodes[n]
    kinds = ["uh-node", "uh-dotnode" if fits is None else fits]
    kinds += ["uh-pin"] * (node.id in view.pins)
    style = f"left:{place[0]:.2f}%;top:{place[1]:.2f}%"
    told = visible(_name(node)) + (f", {node.role}" if node.role else "")
    if node.value is not None:
        back = cell_colour(node.value, limits)
        style += f";background:{back};color:{ink(back)}"
        told += f": {show(node.value, decimals_for([limits.high]))} {view.value_unit}".rstrip()
    inner = tag("span", token_html(_name(node))) if fits is not None else Html("")
    return tag("span", inner, cls=" ".join(k for k in kinds if k), style=style, title=told)


def _row_labels(view: Graph, places: dict[int, tuple[float, float]]) -> list[tuple[str, float]]:
    """The whole layers among the drawn rows, thinned where they would touch."""
    rows = {view.nodes[n].y: places[n][1] for n in places}
    whole = sorted(y for y in rows if float(y).is_integer() and y >= 0)
    step = -(-len(whole) // 24) or 1
    return [(f"{y:g}", rows[y]) for y in whole[::step]]


def _x_labels(view: Graph) -> list[Html]:
    labels = view.x_labels or []
    among = _columns(view, ())
    step = -(-len(labels) // 26) or 1
    return [
        tag("span", token_html(labels[i]), style=f"left:{_spread(float(i), among, 4.0, 92.0):.2f}%",
            cls="uh-odd" if k % 2 else None)
        for k, i in enumerate(range(0, len(labels), step))
    ]  # fmt: skip


def _legend(view: Graph, edges: Sequence[int], places: Iterable[int]) -> Html:
    weights = [view.edges.weight[e] for e in edges]
    top = max((abs(w) for w in weights if w is not None), default=0.0)
    parts = []
    if top:
        ends = f"{show(top, decimals_for([top]), signed=False)} {view.unit}".rstrip()
        parts.append(tag("span", _sample("uh-epos"), "positive weight"))
        parts.append(tag("span", _sample("uh-eneg"), "negative weight"))
        parts.append(tag("span", f"thickest: {ends}"))
    if view.edges.inside is not None and not all(view.edges.inside):
        parts.append(tag("span", _sample("uh-epos uh-out"), "dashed: outside the circuit"))
    if any(w is None for w in weights):
        parts.append(tag("span", _sample("uh-efalse"), "no weight"))
    if view.pins:
        parts.append(tag("span", tag("span", cls="uh-swatch uh-marked"), "pinned"))
    row = swatch_row(*parts) if parts else Html("")
    values = [view.nodes[n].value for n in places]
    if all(v is None for v in values):
        return row
    told = tag("span", "colour of a node: its own value")
    return join([row, legend(limits_of(values, "diverging"), view.value_unit, extra=[told])])


def _sample(kind: str) -> Html:
    stroke = tag("path", d="M1 6H27", cls=kind, style="stroke-width:3")
    return tag("svg", stroke, viewBox="0 0 28 12", cls="uh-sample", aria_hidden="true")


def _words(view: Graph, edges: Sequence[int]) -> Html:
    """Edges as a table: name and weight."""
    decimals = decimals_for(view.edges.weight[e] for e in edges)
    rows = []
    for e in edges:
        outside = view.edges.inside is not None and not view.edges.inside[e]
        note = tag("span", " outside", cls="uh-unit") if outside else Html("")
        number = show(view.edges.weight[e], decimals)
        rows.append(
            tag("tr", tag("th", edge_name(view, e), note, scope="row"),
                tag("td", number, cls="uh-num"))
        )  # fmt: skip
    head = tag("tr", tag("th", "edge", scope="col"),
               tag("th", f"weight {view.unit}".rstrip(), scope="col", cls="uh-num"))  # fmt: skip
    return tag("table", tag("thead", head), tag("tbody", *rows), cls="uh-rows uh-edges")
