"""Every kind everywhere: no table of kinds forgets one, and bad data are refused with reasons."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from underhood.core.errors import FileProblem, UsageError
from underhood.view import (
    View,
    bars,
    bench,
    diff,
    feature,
    graph,
    grid,
    group,
    heads,
    lines,
    picture,
    table,
    text,
    timeline,
    tokens,
    tree,
)
from underhood.view.doc import KINDS, Branch, Diff, Edges, json_schema
from underhood.view.draw import DRAW, READABLE
from underhood.view.flat import flatten, to_csv
from underhood.view.save import encode
from underhood.view.text import to_plain, to_string

FROZEN = Path(__file__).parent / "frozen"
SCHEMA = Path(__file__).parents[2] / "docs" / "view-schema.json"
EVIL = "<script>alert(1)</script>\u202e👩\u200d🚀\x1b[31m שלום\n"


# The lists of kinds ------------------------------------------------------------------------------


def test_every_kind_is_drawn_everywhere(samples: dict[str, View]) -> None:
    assert set(DRAW) == set(text.DRAW) == set(KINDS) - {"group"}
    assert set(KINDS) >= READABLE
    assert {view.kind for view in samples.values()} == set(KINDS)
    for name, view in samples.items():
        assert f"uh-{view.kind}" in view.html(), name
        assert to_string(view) and to_plain(view) and to_csv(view), name
        assert all(encode(view, suffix) for suffix in (".html", ".json", ".csv", ".txt")), name


def test_pictures_are_those_of_grids_differences_and_images(samples: dict[str, View]) -> None:
    drawn = set()
    for name, view in samples.items():
        try:
            assert encode(view, ".png").startswith(b"\x89PNG"), name
            drawn.add(view.kind)
        except UsageError:
            pass
    assert drawn == {"grid", "diff", "picture"}


# Files of earlier versions -----------------------------------------------------------------------


def _within(old: Any, new: Any) -> bool:
    """Whether everything that an old document says is said by a new one."""
    if isinstance(old, dict):
        return all(key in new and _within(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(_within, old, new))
    return old == new


def test_frozen_files_open_for_ever() -> None:
    files = sorted(FROZEN.glob("*.json"))
    assert {json.loads(f.read_text("utf-8"))["kind"] for f in files} == set(KINDS)
    for file in files:
        old = json.loads(file.read_text("utf-8"))
        view = View.from_json(file.read_text("utf-8"), where=file.name)
        assert _within(old, view.to_dict()), f"{file.name} lost something on the way"
        assert view.html() and to_string(view)


def test_published_schema_is_the_present_one() -> None:
    told = json.loads(SCHEMA.read_text("utf-8"))
    assert told == json_schema(), "python scripts/view_schema.py writes it again"
    kinds = {part["properties"]["kind"]["const"] for part in told["$defs"].values()
             if "kind" in part.get("properties", {})}  # fmt: skip
    assert kinds == set(KINDS)


# What is refused ---------------------------------------------------------------------------------

NODES = [{"id": "a", "y": 0, "x": 0}, {"id": "b", "y": 1, "x": 0}]
ONE = grid([[1.0]], rows="a", cols="b")


def _lens(**candidates: Any) -> View:
    return grid([[1.0]], rows="a", cols="b", candidates={"tokens": ["x", "y"], **candidates})


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: graph(NODES, [("a", "c", 1.0)]), "no node 'c'"),
        (lambda: graph([*NODES, NODES[0]], []), "ids"),
        (lambda: graph(NODES, [("a", "b", 1.0)] * 3, total=2), "total"),
        (lambda: graph(NODES, [], supernodes={"g": ["a", "c"]}), "'c'"),
        (lambda: graph(NODES, [], supernodes={"g": ["a"], "h": ["b", "a"]}), "one group only"),
        (lambda: graph(NODES, [], supernodes={"a": ["a", "b"]}), "names that differ"),
        (lambda: graph(NODES, [], supernodes={"": ["a", "b"]}), "name"),
        (lambda: graph(NODES, [], supernodes={"g": []}), "nodes"),
        (lambda: graph(NODES, [], pins=["c"]), "'c'"),
        (lambda: _lens(ids=[[[0, 2]]], values=[[[0.5, 0.1]]]), "none of the 2 tokens"),
        (lambda: _lens(ids=[[[0, 1]]], values=[[[0.5]]]), "cell's candidates"),
        (lambda: _lens(ids=[[[0, 1]]] * 2, values=[[[0.5, 0.1]]] * 2), "rows of the candidates"),
        (lambda: _lens(ids=[[[0]] * 2], values=[[[0.5]] * 2]), "columns of the candidates"),
        (lambda: grid([[1.0]], rows="a", cols="b",
                      measures=[{"name": "rank", "values": [[1.0, 2.0]]}]), "columns of rank"),
        (lambda: graph(NODES, Edges(source=[0], target=[2], weight=[1.0])), "target"),
        (lambda: picture(b"GIF89a"), "not a PNG"),
        (lambda: picture(np.zeros((3, 4))), "height, width, 3"),
        (lambda: picture(np.zeros((3, 4, 3)), alpha=1.5), "alpha"),
        (lambda: feature([{"tokens": "ab", "values": [1.0]}]), "example"),
        (lambda: feature([], histograms=[{"name": "h", "edges": [0], "counts": [1]}]), "edges"),
        (lambda: timeline([0, float("inf")], {"a": [1, 2]}), "steps"),
        (lambda: graph([{"id": "a", "y": float("nan"), "x": 0}], []), "finite"),
        (lambda: grid([[1.0]], rows="a", cols="b", limit=float("inf")), "finite"),
        (lambda: timeline([0, 0], {"a": [1, 2]}), "rise"),
        (lambda: timeline([0, 1], {"a": [1]}), "expected"),
        (lambda: timeline([-1, 1], {"a": [1, 2]}, log=True), "negative"),
        (lambda: timeline([0, 1], {"a": [1, 2]}, tokens="a"), "tokens"),
        (lambda: bench("p", [{"label": "x", "tokens": "a", "strength": 1}]), "unedited"),
        (
            lambda: bench("p", [{"label": "x", "tokens": "a", "effects": {"kl": 0}},
                                {"label": "y", "tokens": "a", "strength": 1}]),
            "side effects",
        ),
        (lambda: diff(ONE, grid([[1.0]], rows="a", cols="c")), "cols"),
        (lambda: diff(ONE, tokens("a", [1.0])), "kind"),
        (lambda: diff(tokens("a"), tokens("a")), "values"),
        (lambda: tree({"name": "x", "children": [{"type": "Linear"}]}), "name"),
        (lambda: grid([[1.0]], rows="a", cols="b", row_at={"layer": [0, 1]}), "layer"),
    ],
)  # fmt: skip
def test_bad_data_are_refused_with_a_reason(make: Any, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        make()


def test_broken_panels_in_files_are_file_problems(samples: dict[str, View]) -> None:
    document = samples["picture"].to_dict() | {"png": "not base64!"}
    with pytest.raises(FileProblem, match="base64"):
        View.from_dict(document)
    document = samples["graph"].to_dict()
    document["edges"]["source"][0] = 10_000
    with pytest.raises(FileProblem, match="source"):
        View.from_dict(document)


# What numbers mean -------------------------------------------------------------------------------


def test_difference_is_a_minus_b() -> None:
    a = grid([[1.0, None], [0.25, 3.0]], rows="ab", cols="cd", scale="sequential")
    b = grid([[0.5, 1.0], [0.25, None]], rows="ab", cols="cd", scale="sequential")
    view = diff(a, b, limit=2)
    assert view.delta.values == [[0.5, None], [0.0, None]]
    assert (view.delta.scale, view.delta.limit) == ("diverging", 2)
    assert "−" in view.delta.title


def test_picture_keeps_its_pixels(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3))
    view = picture(pixels)
    assert view.size == (7, 5)
    seen = np.asarray(image.open(io.BytesIO(encode(view, ".png"))).convert("RGB"))
    assert (seen == pixels).all()
    (tmp_path / "x.png").write_bytes(encode(view, ".png"))
    assert picture(tmp_path / "x.png") == view
    assert picture((tmp_path / "x.png").read_bytes()) == view


def test_strongest_edges_are_drawn_and_the_rest_is_counted() -> None:
    nodes = [{"id": str(i), "y": i % 7, "x": i // 7} for i in range(70)]
    rng = np.random.default_rng(1)
    ends = [(a, b) for a in range(70) for b in range(70) if a % 7 < b % 7]
    weights = rng.normal(0, 1, len(ends))
    view = graph(
        nodes, [(str(a), str(b), w) for (a, b), w in zip(ends, weights, strict=True)],
        total=9000,
    )  # fmt: skip
    page = view.html()
    assert page.count('class="uh-epos"') + page.count('class="uh-eneg"') == 200 + 2  # the legend's
    assert f"200 of {len(ends):,} edges, the strongest (the whole graph has 9,000)" in page
    best = int(np.abs(weights).argmax())
    assert f"{ends[best][0]} → {ends[best][1]}" in to_string(view).split("\n")[1]


def test_edges_of_the_circuit_come_before_stronger_ones_outside() -> None:
    nodes = [*NODES, {"id": "c", "y": 2, "x": 0}]
    view = graph(nodes, [("a", "b", 9.0, False), ("b", "c", 0.1, True)])
    first, second = to_string(view).split("\n")[1:3]
    assert first.startswith("b → c") and second.startswith("a → b")
    assert "1 belong to the circuit" in to_string(view)


def test_an_edge_without_a_weight_is_no_zero() -> None:
    view = graph(NODES, [("a", "b", float("nan"))])
    assert view.edges.weight == [None]
    assert "uh-efalse" in view.html() and "–" in to_string(view)


# What comes in from outside ----------------------------------------------------------------------


def _evil() -> list[View]:
    root: dict[str, Any] = {"name": EVIL, "type": EVIL, "sites": [EVIL], "shapes": {EVIL: [1]}}
    nodes = [{"id": EVIL, "y": 0, "x": 0, "role": EVIL, "value": 1}, NODES[1]]
    one = tokens([EVIL], [1.0], title=EVIL)
    example = {"tokens": [EVIL], "values": [1.0], "note": EVIL}
    arm = {"label": EVIL, "tokens": [EVIL], "note": EVIL, "effects": {EVIL: 1.0}}
    pixels = np.zeros((1, 1, 3))
    return [
        graph(nodes, [(EVIL, "b", 1.0, True, EVIL)], facts={EVIL: 1}, unit=EVIL, x_labels=[EVIL]),
        tree(root | {"children": [root]}),
        picture(pixels, grid([[1.0]], rows=[EVIL], cols=[EVIL], title=EVIL), alt=EVIL),
        feature([example], facts={EVIL: 1}, promoted=[(EVIL, 1)], neighbours=[(EVIL, 1)], unit=EVIL,
                histograms=[{"name": EVIL, "edges": [0, 1], "counts": [1]}]),
        timeline([0], {EVIL: [1.0]}, tokens=[EVIL], marks={EVIL: 0}, y_name=EVIL),
        bench(EVIL, [arm], unit=EVIL, decoding=EVIL),
        diff(one, one, title=EVIL, about=EVIL),
    ]  # fmt: skip


@pytest.mark.parametrize("view", _evil(), ids=lambda view: view.kind)
def test_nothing_in_the_data_reaches_the_page_or_the_terminal(view: View) -> None:
    page = view.html()
    assert "<script" not in page and "\u202e" not in page and "\x1b" not in page
    for plain in (to_string(view), to_plain(view)):
        assert "\x1b" not in plain and "\u202e" not in plain
    assert View.from_json(view.to_json()) == view


@settings(deadline=None, max_examples=20)
@given(st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=6), st.booleans())
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_any_numbers_are_drawn(values: list[float | None], log: bool) -> None:
    n = len(values)
    chain = [{"id": str(i), "y": i, "x": 0, "value": v} for i, v in enumerate([*values, None])]
    strip = tokens(["t"] * n, values)
    views: list[View] = [
        graph(chain, [(str(i), str(i + 1), v) for i, v in enumerate(values)]),
        timeline(range(n), {"a": values}, log=log, marks={"onset": 0}),
        feature([{"tokens": ["t"] * n, "values": values}]),
        bench("p", [{"label": "a", "tokens": ["t"] * n, "values": values}]),
        diff(strip, strip),
        picture(np.zeros((2, 2, 3)), grid([values], rows=[""], cols=range(n))),
    ]
    for view in views:
        assert view.html() and to_string(view)
        assert View.from_json(view.to_json()) == view


def test_nothing_at_all_is_said_and_not_a_crash() -> None:
    views: list[View] = [
        graph([], []), graph(NODES, []), tree({"name": ""}), feature([]),
        timeline([], {}), timeline([], {"a": []}, log=True), timeline([5], {"a": [1]}, log=True),
        bench("", []), diff(tokens([], []), tokens([], [])),
        picture(np.zeros((1, 1, 3)), grid(np.zeros((0, 0)), rows=[], cols=[])), group([]),
    ]  # fmt: skip
    for view in views:
        assert view.html()
        assert isinstance(to_string(view), str) and isinstance(to_csv(view), str)


# What is large -----------------------------------------------------------------------------------


def _big_graph(edges: int) -> View:
    nodes = [{"id": f"a{layer}.h{h}", "y": layer, "x": h} for layer in range(80) for h in range(64)]
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 40 * 64, edges), rng.integers(40 * 64, 80 * 64, edges)
    weight = rng.normal(0, 1, edges)
    return graph(nodes, Edges(source=a.tolist(), target=b.tolist(), weight=weight.tolist()))


def _big_tree() -> View:
    layers = [
        Branch(name=str(i), type="Block", children=[Branch(name=str(k)) for k in range(200)])
        for i in range(100)
    ]
    return tree(Branch(name="model", children=layers))


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: _big_graph(50_000), 400_000),
        (_big_tree, 200_000),
        (lambda: timeline(range(10_000), {"a": np.sin(np.arange(10_000))},
                          tokens=[f" {i}" for i in range(10_000)]), 1_500_000),
        (lambda: diff(grid(np.ones((80, 64)), rows=range(80), cols=range(64)),
                      grid(np.zeros((80, 64)), rows=range(80), cols=range(64))), 200_000),
        (lambda: feature([{"tokens": ["t"] * 1000, "values": np.arange(1000)}] * 20), 6_000_000),
        (lambda: tokens([f" {i}" for i in range(10_000)], np.arange(10_000)), 3_000_000),
        (lambda: grid(np.ones((80, 64)), rows=range(80), cols=range(64)), 100_000),
        (lambda: heads("abcd", {f"{i}.{k}": np.eye(4) for i in range(80) for k in range(64)}),
         300_000),
        (lambda: bars(range(10_000), np.arange(10_000)), 5_000_000),
        (lambda: table(["a", "b"], [[i, 0.5] for i in range(10_000)]), 2_000_000),
        (lambda: lines(range(10_000), {"a": np.sin(np.arange(10_000))}), 800_000),
    ],
    ids=["graph", "tree", "timeline", "diff", "feature", "tokens", "grid", "heads", "bars", "table",
         "lines"],
)  # fmt: skip
def test_large_ones_stay_quick_and_small(make: Any, most: int) -> None:
    view = make()
    start = time.process_time()
    page = view.html()
    assert View.from_json(view.to_json()) == view
    assert len(to_string(view)) < 60_000
    assert time.process_time() - start < 20, "seconds of this process, type checks included"
    assert len(page) < most


def test_long_lists_say_what_they_leave_out() -> None:
    many = {f"0.{i}": np.eye(2) for i in range(100)}
    assert "64 of 100 heads" in heads("ab", many).html()
    views: list[View] = [
        heads("ab", many), bars(range(100), np.ones(100)), table(["a"], [[1]] * 240),
        tokens(["t"] * 440),
    ]  # fmt: skip
    for view in views:
        assert "and 40 more" in to_string(view)
    strip = np.zeros(500)
    strip[321] = -7.0
    assert "t (321)" in to_string(tokens(["t"] * 500, strip))


def test_a_tree_says_what_it_leaves_out() -> None:
    view = _big_tree()
    assert "20,000 modules lie deeper" in view.html()
    assert "more modules" in to_string(view)
    assert len(next(flatten(view)).rows) == 20_101


def test_delta_of_a_big_grid_is_what_numpy_says() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (2, 80, 64))
    layout: dict[str, Any] = {"rows": range(80), "cols": range(64)}
    view = diff(grid(a, **layout), grid(b, **layout))
    assert isinstance(view, Diff)
    assert np.array_equal(np.array(view.delta.values), a - b)
