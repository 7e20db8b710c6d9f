"""Circuits and flows as graphs: every drawn edge is one of the result's, at the right nodes."""

from typing import Any

import numpy as np
import pytest
from random_models import random_model

import underhood as uh
from underhood.circuits import Graph
from underhood.core.model import Model
from underhood.methods.graph_view import graph_view
from underhood.methods.locate.circuit import circuit
from underhood.methods.locate.commitment import commitment
from underhood.methods.locate.edge_attribution import edge_attribution
from underhood.methods.locate.information_flow import information_flow
from underhood.view import View
from underhood.view.doc import Graph as GraphView
from underhood.view.doc import Group


@pytest.fixture(scope="module")
def town() -> Model:
    return uh.load()


def capitals() -> uh.Pairs:
    return uh.Pairs.one(
        "the capital of France is", "the capital of Japan is", "Paris", "Tokyo"
    )  # fmt: skip


def graphs(view: View) -> list[GraphView]:
    if isinstance(view, Group):
        return [found for part in view.views for found in graphs(part)]
    return [view] if isinstance(view, GraphView) else []


def rows(view: GraphView) -> list[tuple[str, str, float | None, str]]:
    """Source, target, weight and name of every edge."""
    edges, ids = view.edges, [node.id for node in view.nodes]
    names = edges.label or [""] * len(edges.source)
    return [
        (ids[a], ids[b], w, name)
        for a, b, w, name in zip(edges.source, edges.target, edges.weight, names, strict=True)
    ]


def bare(end: str) -> str:
    return end.partition("<")[0]


def test_circuit_draws_its_edges_and_no_others(town: Model) -> None:
    found = circuit(town, capitals(), by="eap", draws=2)
    (view,) = graphs(found.view)
    inside = {str(n): float(s) for n, s, m in zip(
        found["name"].values, found["score"].values, found["in_circuit"].values, strict=True
    ) if m}  # fmt: skip
    drawn = rows(view)
    assert {name: weight for *_, weight, name in drawn} == pytest.approx(inside, rel=1e-5)
    for source, target, _, name in drawn:
        start, _, end = name.partition("->")
        assert source == start and target == bare(end), "town has no grouped heads"
    assert view.total == found.data.sizes["edge"]
    assert view.facts["edges"] == len(inside) and view.facts["parts"] == found.data.sizes["node"]
    assert view.facts["faithfulness"] == pytest.approx(float(found["f"]), abs=1e-3)
    needed = dict(zip(found["node"].values.tolist(), found["needed"].values.tolist(), strict=True))
    values = {n.id: n.value for n in view.nodes if n.value is not None}
    assert values == pytest.approx(needed)
    heights = {n.id: n.y for n in view.nodes}
    assert all(heights[a] < heights[b] for a, b, *_ in drawn), "edges lead upwards"
    heads = {n.id: n.at for n in view.nodes if n.role == "head"}
    assert heads["a0.h1"] == {"layer": 0, "head": 1}


def test_edge_attribution_draws_the_strongest(town: Model) -> None:
    found = edge_attribution(town, capitals(), by="eap", verify_top=0)
    (view,) = graphs(found.view)
    sizes = np.sort(np.abs(found["score"].values))[::-1][:200]
    weights = [abs(weight or 0) for *_, weight, _ in rows(view)]
    assert weights == pytest.approx(sizes.tolist(), rel=1e-5)


@pytest.mark.parametrize("experts", [False, True])
def test_shared_destinations_are_nodes_of_their_own(experts: bool) -> None:
    """Grouped keys and values feed several heads, a mixture's input several experts."""
    graph = Graph.of(random_model("mixtral"), experts=experts)
    names = [graph.edge(u, v) for u, v in graph.real.nonzero().tolist()]
    view: Any = graph_view(graph, [(name, 1.0) for name in names])
    drawn = {name: (source, target) for source, target, _, name in rows(view)}
    assert set(drawn) == set(names), "each edge is drawn once"
    assert all(source == name.partition("->")[0] for name, (source, _) in drawn.items())
    ends = {name.partition("->")[2]: target for name, (_, target) in drawn.items()}
    assert ends["a1.h3<q>"] == "a1.h3", "queries belong to one head"
    assert ends["a1.h1<k>"] == "a1.h1<k>" and ends["a1.h1<v>"] == "a1.h1<v>"
    assert ends["m1"] == "m1" and ("m1<router>" in ends) == experts
    places = {node.id: (node.x, node.y) for node in view.nodes}
    assert len(set(places.values())) == len(places), "no node covers another"
    assert places["a1.h2"][0] < places["a1.h1<k>"][0] < places["a1.h1<v>"][0] < places["a1.h3"][0]
    assert view.html()


def test_flow_from_every_token_is_one_graph(town: Model) -> None:
    found = information_flow(town, capitals(), targets="each", control=False)
    (view,) = graphs(found.view)
    effect = found["effect"]
    assert view.x_labels is not None and view.total == int((effect.fillna(0) != 0).sum())
    for source, target, weight, _ in rows(view):
        key, layer = source.split("@")
        query, after = target.split("@")
        cell = effect.sel(layer=int(layer), query=int(query), key=key)
        assert weight == pytest.approx(float(cell), rel=1e-5)
        assert int(after) == int(found["last"].sel(layer=int(layer))) + 1
        assert int(key) < int(query), "attention looks back"
    strongest = float(np.nanmax(np.abs(effect.values)))
    assert max(abs(w or 0) for *_, w, _ in rows(view)) == pytest.approx(strongest, rel=1e-5)


def test_trace_graphs_hold_the_strongest_supports() -> None:
    pairs = uh.organism("village").pairs("indirect_object", 2, 0)
    found = commitment(uh.load("village"), pairs, top=3)
    views = graphs(found.view)
    runs = list(dict.fromkeys(found["edge_run"].values.tolist()))
    assert len(views) == len(runs) > 0
    for view, run in zip(views, runs, strict=True):
        part = found.data.isel(edge=(found["edge_run"] == run).values)
        names = [
            (f"{a} @ {i}", f"{b} @ {j}", w)
            for a, i, b, j, w in zip(
                part["edge_source"].values, part["edge_layer"].values, part["edge_target"].values,
                part["edge_to"].values, part["weight"].values, strict=True,
            )
        ]  # fmt: skip
        names.sort(key=lambda row: -abs(row[2]))
        told = [(a, b, w) for a, b, w, _ in rows(view)]
        assert [row[:2] for row in told] == [row[:2] for row in names[:200]]
        assert [row[2] for row in told] == pytest.approx([row[2] for row in names[:200]])
