"""A circuit in the reader's hands: lists of edges, pinned, renamed and grouped nodes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from browser_kit import NEEDS_CHROMIUM, Tab, browser, saved
from underhood.view import View, graph, group
from underhood.view.doc import Graph
from underhood.view.supernodes import merged

pytestmark = NEEDS_CHROMIUM

NODES = [{"id": "in", "y": 0, "x": 1}, {"id": "out", "y": 2, "x": 1},
         *({"id": f"m{x}", "y": 1, "x": x} for x in range(3))]  # fmt: skip
EDGES = [("in", "m0", 1.0), ("in", "m1", 2.0), ("in", "m2", -0.25),
         ("m0", "out", -0.5), ("m1", "out", 0.75), ("m2", "out", 0.5)]  # fmt: skip
CIRCUIT = graph(NODES, EDGES, title="Circuit")


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as make:
        yield make(accept_downloads=True)


def node(view: Any, name: str) -> Any:
    return view.locator(".uh-node", has_text=name)


def names(view: Any) -> list[str]:
    return sorted(view.locator(".uh-node").all_inner_texts())


def document(tab: Tab, view: Any) -> Graph:
    found = View.from_json(saved(tab, view, "JSON"))
    assert isinstance(found, Graph)
    return found


def made_group(view: Any, *members: str, name: str = "movers") -> None:
    for member in members:
        node(view, member).click(modifiers=["Shift"])
    view.get_by_label("name of the group").fill(name)
    view.get_by_role("button", name="group", exact=True).click()


def lists(view: Any) -> list[list[str]]:
    columns = view.locator(".uh-four > div").all()
    return [[item.inner_text().replace("\n", " ") for item in column.locator("li").all()]
            for column in columns]  # fmt: skip


def test_a_click_lists_edges_by_direction_and_sign(tab: Tab) -> None:
    view = tab.draw(CIRCUIT)
    node(view, "in").click()
    assert lists(view) == [[], [], ["m1 +2.00", "m0 +1.00"], ["m2 −0.250"]]
    node(view, "out").click()
    assert lists(view) == [["m1 +0.750", "m2 +0.500"], ["m0 −0.500"], [], []]
    tab.page.keyboard.press("Escape")
    assert view.locator(".uh-four").count() == 0


def test_shift_click_pins_and_pinned_nodes_stay(tab: Tab) -> None:
    view = tab.draw(CIRCUIT)
    node(view, "m2").click(modifiers=["Shift"])
    assert view.locator(".uh-node.uh-pin").all_inner_texts() == ["m2"]
    view.locator("input[type=range]").fill("0")
    assert names(view) == ["in", "m1", "m2"], "the strongest edge, and what is pinned"
    node(view, "in").click(modifiers=["Shift"])
    assert view.locator(".uh-wires path").count() == 2, "and the edge between pinned nodes"
    assert document(tab, view).pins == ["m2", "in"]
    view.get_by_role("button", name="m2 × unpin").click()
    assert document(tab, view).pins == ["in"]
    tab.quiet()


def test_pinning_by_keyboard(tab: Tab) -> None:
    view = tab.draw(CIRCUIT)
    view.locator(".uh-net").focus()
    for key in ("ArrowDown", "ArrowDown", "Shift+Enter"):
        tab.page.keyboard.press(key)
    assert view.locator(".uh-pin").all_inner_texts() == ["m1"]
    tab.page.keyboard.press("Enter")
    button = view.get_by_role("button", name="pin", exact=True)
    assert button.get_attribute("aria-pressed") == "true"
    button.focus()
    tab.page.keyboard.press("Enter")
    assert view.locator(".uh-pin").count() == 0
    assert view.locator(".uh-four").count() == 1, "the node is still chosen"
    view.get_by_label("name of this node").fill("copies")
    tab.page.keyboard.press("Enter")
    assert "copies" in names(view) and "m1" not in names(view)
    tab.quiet()


def test_a_group_is_one_node_with_summed_edges(tab: Tab) -> None:
    view = tab.draw(CIRCUIT)
    made_group(view, "m0", "m1")
    assert names(view) == ["in", "m2", "movers", "out"]
    assert lists(view) == [["in +3.00"], [], ["out +0.250"], []], "it is chosen at once"
    assert view.locator(".uh-pin").all_inner_texts() == ["movers"]
    assert "group of m0, m1" in (node(view, "movers").get_attribute("title") or "")
    tab.quiet()


def test_what_is_saved_opens_again(tab: Tab) -> None:
    view = tab.draw(CIRCUIT)
    node(view, "m2").click()
    view.get_by_label("name of this node").fill("quiet one")
    view.get_by_role("button", name="rename").click()
    made_group(view, "m0", "m1")
    found = document(tab, view)
    assert [(g.name, g.nodes) for g in found.supernodes] == [("movers", ["m0", "m1"])]
    assert found.nodes[4].label == "quiet one" and found.nodes[4].id == "m2"
    assert found.edges == CIRCUIT.edges, "nothing of the measurement is lost"
    assert merged(found).edges.weight == [3.0, -0.25, 0.25, 0.5]
    static, live = tab.both(found)
    assert live == static
    assert "movers" in live["words"] and "quietone" in live["words"]


def test_a_group_can_be_renamed_and_taken_apart(tab: Tab) -> None:
    view = tab.draw(CIRCUIT)
    made_group(view, "m0", "m1")
    view.get_by_label("name of this node").fill("copiers")
    view.get_by_role("button", name="rename").click()
    assert names(view) == ["copiers", "in", "m2", "out"]
    made_group(view, "m2", name="all of them")
    assert names(view) == ["all of them", "in", "out"], "a group can join another"
    view.get_by_role("button", name="ungroup").click()
    assert names(view) == ["in", "m0", "m1", "m2", "out"]
    assert document(tab, view).supernodes == []
    assert document(tab, view).edges == CIRCUIT.edges


def test_a_name_that_is_taken_is_refused(tab: Tab) -> None:
    view = tab.draw(CIRCUIT)
    made_group(view, "m0", "m1", name="out")
    field = view.get_by_label("name of the group")
    assert field.evaluate("(e) => e.validationMessage") == "“out” is the name of another node."
    assert names(view) == ["in", "m0", "m1", "m2", "out"]
    field.fill("")
    view.get_by_role("button", name="group", exact=True).click()
    assert field.evaluate("(e) => e.validationMessage") == "Give the group a name."
    field.fill("both")
    view.get_by_role("button", name="group", exact=True).click()
    assert names(view) == ["both", "in", "m2", "out"]


def test_the_chosen_node_stays_the_same_while_edges_come_and_go(tab: Tab) -> None:
    """It was remembered by its row, which is another one when rows above it are gone."""
    nodes = [{"id": f"n{y}", "y": y, "x": 0} for y in range(6)]
    edges = [(f"n{y}", f"n{y + 1}", 5.0 - y) for y in range(5)]
    view = tab.draw(graph(nodes, edges))
    node(view, "n1").click()
    told = view.locator(".uh-readout").inner_text()
    view.locator("input[type=range]").fill("0")
    assert names(view) == ["n0", "n1"]
    assert view.locator(".uh-kept").all_inner_texts() == ["n1"]
    view.locator(".uh-title, .uh-note").first.hover()
    assert view.locator(".uh-readout").inner_text().split(";")[0] == told.split(";")[0]


def test_changes_outlive_a_new_drawing_of_what_is_around(tab: Tab) -> None:
    view = tab.draw(group([CIRCUIT, CIRCUIT.model_copy(update={"title": "Other"})]))
    first = view.locator("uh1-graph").first
    made_group(first, "m0", "m1")
    view.evaluate("(e) => { e.requestUpdate(); return e.updateComplete; }")
    assert names(first) == ["in", "m2", "movers", "out"]
    assert names(view.locator("uh1-graph").nth(1)) == ["in", "m0", "m1", "m2", "out"]


def test_groups_merge_as_in_python(tab: Tab, samples: dict[str, View]) -> None:
    grouped = samples["grouped"]
    assert isinstance(grouped, Graph)
    view = tab.draw(grouped)
    live = view.evaluate("(e) => ({ nodes: e.drawn.nodes, edges: e.drawn.edges })")
    ours = json.loads(merged(grouped).to_json())
    assert [(n["id"], n["y"], n["x"], n.get("role", "")) for n in live["nodes"]] == [
        (n["id"], n["y"], n["x"], n.get("role", "")) for n in ours["nodes"]
    ]
    assert {k: v for k, v in live["edges"].items() if v is not None} == ours["edges"]
