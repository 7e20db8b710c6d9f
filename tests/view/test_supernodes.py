"""Groups of nodes: what a graph is when each is one node."""

import numpy as np
import pytest

from underhood.view import graph
from underhood.view.doc import Graph
from underhood.view.supernodes import merged
from underhood.view.text import to_string


def some(**options: object) -> Graph:
    nodes = [{"id": f"n{i}", "y": i % 4, "x": i, "at": {"layer": i % 4}} for i in range(12)]
    rng = np.random.default_rng(0)
    edges = [(f"n{a}", f"n{b}", float(rng.integers(-8, 8)), bool(rng.random() < 0.5))
             for a in range(12) for b in range(12) if a % 4 < b % 4]  # fmt: skip
    return graph(nodes, edges, **options)  # pyright: ignore[reportArgumentType]


def matrix(view: Graph) -> dict[tuple[str, str], float]:
    """Summed weights by the ids of the ends."""
    found: dict[tuple[str, str], float] = {}
    for a, b, w in zip(view.edges.source, view.edges.target, view.edges.weight, strict=True):
        ends = (view.nodes[a].id, view.nodes[b].id)
        found[ends] = found.get(ends, 0.0) + (w or 0.0)
    return found


def test_without_groups_a_graph_is_itself() -> None:
    view = some()
    assert merged(view) is view


def test_edges_are_summed_and_those_inside_go() -> None:
    groups = {"one": ["n0", "n1", "n5"], "two": ["n2", "n6"]}
    view = some(supernodes=groups, pins=["one", "n3"])
    home = {node: name for name, nodes in groups.items() for node in nodes}
    wanted: dict[tuple[str, str], float] = {}
    for (a, b), weight in matrix(view).items():
        ends = (home.get(a, a), home.get(b, b))
        if ends[0] != ends[1]:
            wanted[ends] = wanted.get(ends, 0.0) + weight
    shown = merged(view)
    assert matrix(shown) == wanted
    assert len(shown.edges.source) == len(wanted), "one edge for each pair of ends"
    assert [node.id for node in shown.nodes[-2:]] == ["one", "two"]
    assert len(shown.nodes) == 12 - 5 + 2


def test_an_edge_of_a_group_is_inside_if_one_of_its_edges_is() -> None:
    nodes = [{"id": name, "y": y, "x": 0} for name, y in (("a", 0), ("b", 0), ("c", 1))]
    edges = [("a", "c", None, False), ("b", "c", 2.0, True)]
    shown = merged(graph(nodes, edges, supernodes={"g": ["a", "b"]}))
    assert (shown.edges.weight, shown.edges.inside) == ([2.0], [True])
    alone = merged(graph(nodes, edges[:1], supernodes={"g": ["a", "b"]}))
    assert (alone.edges.weight, alone.edges.inside) == ([None], [False])


def test_parallel_edges_between_plain_nodes_stay() -> None:
    """Queries, keys and values of one head are edges of their own."""
    nodes = [{"id": name, "y": y, "x": 0} for y, name in enumerate("abcd")]
    edges = [("a", "b", 1.0, True, "a->b<q>"), ("a", "b", 2.0, True, "a->b<k>"),
             ("b", "c", 1.0, True, "b->c<q>"), ("b", "c", 2.0, True, "b->c<k>")]  # fmt: skip
    shown = merged(graph(nodes, edges, supernodes={"g": ["c", "d"]}))
    assert shown.edges.label == ["a->b<q>", "a->b<k>", "b → g"]
    assert shown.edges.weight == [1.0, 2.0, 3.0]


def test_a_group_stands_between_its_members_and_shares_what_they_share() -> None:
    node = merged(some(supernodes={"g": ["n0", "n4", "n8"]})).nodes[-1]
    assert (node.y, node.x, node.at) == (0.0, 4.0, {"layer": 0})
    assert node.role == "group of n0, n4, n8"
    assert merged(some(supernodes={"g": ["n0", "n1"]})).nodes[-1].at == {}


@pytest.mark.parametrize("pins", [["n11", "n3"], ["g", "n3"]])
def test_pinned_nodes_are_drawn_however_few_edges_are(pins: list[str]) -> None:
    nodes = [{"id": f"n{i}", "y": i, "x": 0} for i in range(400)]
    edges = [(f"n{i}", f"n{i + 1}", 10.0) for i in range(100, 399)]
    edges += [("n3", "n11", 0.001), ("n5", "n11", 0.001)]
    groups = {"g": ["n11", "n12"]} if "g" in pins else None
    static = graph(nodes, edges, supernodes=groups, pins=pins).html()
    assert static.count('class="uh-node uh-pin"') == 2
    assert "201 of 301 edges" in static, "that between the two, not that to another node"
    assert ">pinned<" in static


def test_text_shows_groups_too() -> None:
    told = to_string(some(supernodes={"early": ["n0", "n4"]}))
    assert "early → " in told
