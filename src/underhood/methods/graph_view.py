"""How edges of a model's graph are drawn: heads and MLPs in rows by layer.

Keys and values of grouped heads, and what a mixture's experts read, belong to several nodes at
once: such a destination is a node of its own, beside those that it feeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import torch

from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.graph import MLPS, Graph
from underhood.view import View
from underhood.view import graph as graph_of

__all__ = ["circuit_graph", "graph_view"]

_KEPT = 2000  # edges in the document
_BESIDE = {"k": -0.3, "v": 0.3, "router": 0.6}  # they read at one place, for several nodes
_ROLES = {"input": "input", "heads": "head", "mixer": "mixer", "mlp": "MLP", "experts": "expert"}


def graph_view(
    graph: Graph,
    edges: Sequence[tuple[str, SupportsFloat]],
    *,
    values: Mapping[str, SupportsFloat] | None = None,
    **common: Any,
) -> View:
    """The edges as a graph.

    Args:
        graph: What they are edges of.
        edges: Name and weight of each, the strongest first; more than two thousand are cut.
        values: A number of each node, by name.
        **common: What the builder `underhood.view.graph` takes besides.
    """
    kept = edges[:_KEPT]
    nodes, homes = _nodes(graph)
    ends = [graph.find(name) for name, _ in kept]
    rows = [
        (graph.sources[u], homes[v], weight, True, name)
        for (name, weight), (u, v) in zip(kept, ends, strict=True)
    ]
    used = {end for row in rows for end in row[:2]}
    for name, value in (values or {}).items():
        if name in nodes:
            nodes[name]["value"] = float(value)
    told = common.pop("about", "")
    if len(kept) < len(edges):
        told = f"{told} Only the {len(kept):,} strongest of {len(edges):,} edges are kept.".lstrip()
    return graph_of(
        [node for name, node in nodes.items() if name in used],
        rows,
        total=graph.n_edges,
        x_name="heads from left to right, MLPs at the right",
        about=told,
        **common,
    )


def circuit_graph(circuit: Circuit, scores: Scores, **common: Any) -> View:
    """A circuit's edges by score; `common` as in `graph_view`."""
    inside = set(circuit.edges)
    ranked = scores.strongest(scores.graph.n_edges)
    return graph_view(circuit.graph, [edge for edge in ranked if edge[0] in inside], **common)


def _nodes(graph: Graph) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All nodes by name, and the node that each destination stands at."""
    layers = len(graph.parallel)
    heads = max((w.heads for w in graph.writers if w.kind == "heads"), default=1)
    nodes: dict[str, dict[str, Any]] = {}
    for number, writer in enumerate(graph.writers):
        spots = graph.written(number)
        for i, source in enumerate(spots):
            name = graph.sources[source]
            late = writer.kind in MLPS
            nodes[name] = {
                "id": name, "y": writer.layer + 0.5 * late,
                "x": _place(i, len(spots), heads, late, writer.kind == "input"),
                "role": _ROLES[writer.kind], "at": _at(writer.layer, writer.kind, i),
            }  # fmt: skip
    homes = []
    for number, reader in enumerate(graph.readers):
        for destination in graph.read(number):
            name = graph.destinations[destination]
            fed = torch.nonzero(graph.feeds[destination]).flatten().tolist()
            if reader.kind == "logits":
                nodes[name] = {"id": name, "y": float(layers), "x": heads / 2, "role": "logits"}
            elif len(fed) == 1:
                name = graph.sources[fed[0]]
            else:
                places = [nodes[graph.sources[s]]["x"] for s in fed]
                late = reader.kind in MLPS
                nodes[name] = {
                    "id": name, "y": reader.layer + 0.5 * late - 0.2,
                    "x": sum(places) / len(places) + _BESIDE.get(reader.kind, 0.0),
                    "at": {"layer": reader.layer},
                    "role": f"what {len(fed)} nodes read together",
                }  # fmt: skip
            homes.append(name)
    return nodes, homes


def _place(i: int, several: int, heads: int, late: bool, alone: bool) -> float:
    """Heads by number; one MLP right of them; the input in the middle; experts over the width."""
    if alone:
        return heads / 2
    if several == 1:
        return float(heads) if late else heads / 2
    return i * heads / several if late else float(i)


def _at(layer: int, kind: str, i: int) -> dict[str, int]:
    if kind == "input":
        return {}
    return {"layer": layer, "head": i} if kind == "heads" else {"layer": layer}
