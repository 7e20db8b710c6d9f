"""Groups of nodes in a circuit, each drawn as one node.

A reader of a circuit puts nodes together and gives them a name. The document keeps the nodes, their
edges and the groups; drawings show `merged(view)`: one node for each group, at the mean place of
its members, and one edge for all the edges between it and another node, with their weights summed.
"""

from collections.abc import Sequence

from underhood.view.base import Axis
from underhood.view.panels import Edges, Graph, Node, Supernode

_TOLD = 6  # members named in words


def merged(view: Graph) -> Graph:
    """The graph with each group as one node. Without groups, the graph itself."""
    if not view.supernodes:
        return view
    home = {name: group.name for group in view.supernodes for name in group.nodes}
    outside = [node for node in view.nodes if node.id not in home]
    nodes = [*outside, *(_node(view, group) for group in view.supernodes)]
    number = {node.id: n for n, node in enumerate(nodes)}
    numbers = [number[home.get(node.id, node.id)] for node in view.nodes]
    edges = _edges(view.edges, numbers, nodes, len(outside))
    return view.model_copy(update={"nodes": nodes, "edges": edges, "supernodes": []})


def _node(view: Graph, group: Supernode) -> Node:
    wanted = set(group.nodes)
    members = [node for node in view.nodes if node.id in wanted]
    more = f" and {len(members) - _TOLD} more" if len(members) > _TOLD else ""
    shared: dict[Axis, int] = {
        axis: number
        for axis, number in members[0].at.items()
        if all(node.at.get(axis) == number for node in members)
    }
    return Node(
        id=group.name,
        y=_sum([node.y for node in members]) / len(members),
        x=_sum([node.x for node in members]) / len(members),
        role=f"group of {', '.join(node.label or node.id for node in members[:_TOLD])}{more}",
        at=shared,
    )


def _sum(values: Sequence[float]) -> float:
    """From left to right, as the script does it; `sum` compensates for rounding."""
    total = 0.0
    for value in values:
        total += value
    return total


def _edges(edges: Edges, numbers: Sequence[int], nodes: Sequence[Node], first: int) -> Edges:
    """Edges that end at a group (a node from `first` on) become one each; those inside go."""
    source: list[int] = []
    target: list[int] = []
    weight: list[float | None] = []
    inside: list[bool] = []
    label: list[str] = []
    known: dict[tuple[int, int], int] = {}
    for e, (a, b) in enumerate(zip(edges.source, edges.target, strict=True)):
        ends = (numbers[a], numbers[b])
        summed = max(ends) >= first
        if summed and ends[0] == ends[1]:
            continue
        mine = edges.weight[e]
        within = edges.inside is None or edges.inside[e]
        at = known.get(ends) if summed else None
        if at is None:
            if summed:
                known[ends] = len(source)
            source.append(ends[0])
            target.append(ends[1])
            weight.append(mine)
            inside.append(within)
            names = " → ".join(nodes[n].label or nodes[n].id for n in ends)
            label.append(names if summed or edges.label is None else edges.label[e])
        else:
            if mine is not None:
                weight[at] = (weight[at] or 0.0) + mine
            inside[at] = inside[at] or within
    return Edges(
        source=source,
        target=target,
        weight=weight,
        inside=None if edges.inside is None else inside,
        label=None if edges.label is None else label,
    )
