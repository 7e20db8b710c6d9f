"""Every kind of element, drawn from its document and compared with what Python draws."""

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from browser_kit import NEEDS_CHROMIUM, Tab, browser, saved
from underhood.view import View, bars, graph, grid, group, heads, lines, table, tokens
from underhood.view.colour import cell_colour, limits_of
from underhood.view.doc import KINDS
from underhood.view.flat import to_csv

pytestmark = NEEDS_CHROMIUM

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&"


@pytest.fixture(scope="module")
def open_tab() -> Iterator[Callable[..., Tab]]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab(accept_downloads=True)


def test_samples_cover_every_kind(samples: dict[str, View]) -> None:
    assert {view.kind for view in samples.values()} == set(KINDS)


def test_elements_draw_what_python_draws(tab: Tab, samples: dict[str, View]) -> None:
    for name, view in samples.items():
        if name == "group":
            continue  # folded: drawn when it is opened, see below
        static, live = tab.both(view)
        for part in static:
            assert live[part] == static[part], f"{name}: {part}"
        assert static["words"] or static["pixels"], name
    tab.quiet()


def test_extreme_and_missing_numbers_are_drawn_alike(tab: Tab) -> None:
    rng = np.random.default_rng(1)
    wide = rng.normal(0, 1, (30, 40)) ** 5
    wide[3] = np.nan
    views = [
        grid([[np.nan, 4.3e-5, -1e-6, 0.125]], rows=["a"], cols="bcde", unit="nats"),
        grid([[2.5e7, -1e5]], rows=["a"], cols="bc"),
        grid(wide, rows=range(30), cols=range(40), marks=[(2, 2)]),
        grid([], rows=[], cols=[]),
        bars(["a9.h6", "x" * 40, "z"], [2.5e7, -1e6, np.nan], total=1e7, baseline=[[0, 1e6]] * 3),
        bars([f"part {i}" for i in range(60)], rng.normal(0, 1, 60)),
        lines(["a", "b", "c"], {"s": [1.0, np.nan, 3e6], "t": [0, 1, 2]}, y_name="loss"),
        lines([], {}),
        table(["a", {"name": "b", "format": "+.2f"}, {"name": "c", "format": ",d"},
               {"name": "d", "format": ".1%"}, {"name": "e", "format": ".3g"}],
              [["x", -0.125, 12345, 0.5, 1.5e-7], [None, 2.675, -5, 0.0005, 1234567.0]]),
        heads(["a"] * 30, {"0.0": np.tril(np.ones((30, 30))) / 30}),
        tokens(["a", "b"], [None, None]),
    ]  # fmt: skip
    for number, view in enumerate(views):
        static, live = tab.both(view)
        for part in static:
            assert live[part] == static[part], f"view {number} ({view.kind}): {part}"
    tab.quiet()


def test_any_numbers_are_written_alike(tab: Tab) -> None:
    rng = np.random.default_rng(5)
    views: list[View] = []
    for power in range(-12, 13):
        values = rng.normal(0, 1, (2, 4)) * 10.0**power
        values[0, 0] = round(values[0, 0] * 8) / 8  # halves, which are rounded to even
        views.append(grid(values, rows="ab", cols="cdef", unit="u"))
        views.append(bars("abcd", values[1], signed=False, total=float(values[1].sum())))
        views.append(lines("abcd", {"s": values[0]}, y_name="y"))
    eighths = np.arange(-12, 12).reshape(4, 6) / 8
    views += [
        grid(eighths, rows="abcd", cols="efghij", limit=500),
        table([{"name": f, "format": f} for f in ("+.2f", ".0f", ".1%", ",.1f", "g", ".2e")],
              [[x, x * 1e4, x, x * 1e6, x, x] for x in eighths.ravel().tolist()]),
    ]  # fmt: skip
    static, live = tab.both(group(views))
    assert live == static


def test_limits_and_colours_are_those_of_python(tab: Tab) -> None:
    rng = np.random.default_rng(2)
    tab.draw(tokens(["a"]))
    for scale in ("diverging", "sequential", "probability"):
        for size in (1, 7, 201, 1000):
            values = rng.standard_cauchy(size) if scale == "diverging" else rng.random(size)
            limits = limits_of(values, scale)
            found = tab.page.evaluate(
                "([values, scale]) => { const l = underhood1.limitsOf(values, scale, null);"
                " return [l.low, l.high, l.clipped, l.extreme,"
                " values.map((v) => underhood1.colourOf(v, l))]; }",
                [values.tolist(), scale],
            )
            ends = [limits.low, limits.high, limits.clipped, limits.extreme]
            assert found[:4] == pytest.approx(ends, rel=1e-12)
            assert found[4] == [cell_colour(v, limits) for v in values.tolist()]


def test_outside_text_stays_text(tab: Tab) -> None:
    one = [EVIL]
    odd = [EVIL, "👩\u200d🔬", "שלום", "a\u202eb", "\x1b[0m", "\n", "\t", "", "  two "]
    common = {"title": EVIL, "about": EVIL, "provenance": {EVIL: EVIL}, "python": EVIL}
    views = [
        tokens(odd, range(9), unit=EVIL, title=EVIL),
        grid([[1.0] * 9], rows=one, cols=odd, row_name=EVIL, col_name=EVIL, **common),
        bars(one, [1.0], unit=EVIL, total=1.0, total_label=EVIL, baseline=[0.1]),
        heads(odd, {EVIL: np.eye(9)}, notes={EVIL: EVIL}),
        lines(odd, {EVIL: range(9)}, x_name=EVIL, y_name=EVIL),
        table([{"name": EVIL, "unit": EVIL}], [one]),
        group([tokens(one)], folded=True, title=EVIL),
    ]
    for view in views:
        static, live = tab.both(view)
        if view.kind != "group":
            assert live == static
        assert tab.page.locator("body > .uh-view script, body > .uh-view [onerror]").count() == 0
    tab.quiet()


def test_hover_peeks_click_locks_escape_frees(tab: Tab, samples: dict[str, View]) -> None:
    view = tab.draw(samples["grid"])
    tab.page.evaluate(
        "() => { globalThis.chosen = []; addEventListener('uh-select',"
        " (e) => chosen.push(e.detail)); }"
    )
    readout = view.locator(".uh-claim > .uh-readout")
    cell = view.locator(".uh-claim td[data-at='4,10']")
    cell.hover()
    title = cell.get_attribute("title")
    assert title is not None and readout.inner_text() == title
    assert tab.page.evaluate("underhood1.selection.get().layer") == 4
    # The control shows the same cell.
    assert view.locator(".uh-control td.uh-linked").get_attribute("data-at") == "4,10"
    view.locator(".uh-title").first.hover()
    assert "hover to look" in readout.inner_text()
    cell.click()
    view.locator(".uh-title").first.hover()
    assert readout.inner_text().startswith(title) and "Esc frees" in readout.inner_text()
    detail = tab.page.evaluate("chosen")
    assert [(d["kind"], d["row"], d["col"], d["layer"], d["pos"]) for d in detail] == [
        ("grid", 4, 10, 4, 10)
    ]
    view.locator(".uh-claim .uh-scroll").press("Escape")
    assert tab.page.evaluate("underhood1.selection.get().locked") is False
    assert view.locator(".uh-kept").count() == 0


def test_arrow_keys_move_and_enter_keeps(tab: Tab, samples: dict[str, View]) -> None:
    for name, inner in (("grid", ".uh-claim .uh-scroll"), ("wide", ".uh-plate"),
                        ("tokens", ".uh-strip"), ("lines", ".uh-area"), ("heads", ".uh-plate"),
                        ("bars", ".uh-bars")):  # fmt: skip
        view = tab.draw(samples[name])
        place = view.locator(inner).first
        place.focus()
        place.press("ArrowDown")
        place.press("ArrowDown")
        place.press("ArrowRight")
        peeked = tab.page.evaluate("document.querySelector('body > .uh-view').peeked")
        size = tab.page.evaluate("document.querySelector('body > .uh-view').size()")
        assert peeked == [min(1, size["rows"] - 1), min(1, size["cols"] - 1)], name
        place.press("Enter")
        assert "Esc frees" in view.locator(".uh-readout").first.inner_text(), name
        place.press("Escape")
        assert "Esc frees" not in view.locator(".uh-readout").first.inner_text(), name


def test_views_of_one_page_follow_each_other(tab: Tab, samples: dict[str, View]) -> None:
    first = tab.draw(samples["tokens"], samples["lens"], samples["heads"])
    first.locator("[data-at='0,4']").click()
    second = tab.page.locator("body > uh1-grid")
    assert second.locator("td.uh-linked").count() == 12
    assert tab.page.locator("body > uh1-heads .uh-frame.uh-linked").count() == 3
    second.locator("td[data-at='2,7']").hover()
    assert tab.page.evaluate("underhood1.selection.get().pos") == 4, "a lock is not peeked away"
    tab.page.keyboard.press("Escape")


def test_a_view_that_comes_later_shows_the_selection(tab: Tab, samples: dict[str, View]) -> None:
    first = tab.draw(samples["tokens"])
    first.locator("[data-at='0,4']").click()
    tab.page.evaluate(
        "(doc) => document.body.append(underhood1.element(doc))", samples["lens"].to_dict()
    )
    second = tab.page.locator("body > uh1-grid")
    second.locator("td.uh-linked").first.wait_for()
    assert second.locator("td.uh-linked").count() == 12
    tab.page.locator("body").press("Escape")
    assert second.locator("td.uh-linked").count() == 0


def test_exports_hold_the_data(tab: Tab, samples: dict[str, View]) -> None:
    for name in ("grid", "wide", "heads", "lines", "table", "bars", "texts", "graph", "feature"):
        samples_view = samples[name]
        view = tab.draw(samples_view)
        document = json.loads(saved(tab, view, "JSON"))
        assert document == json.loads(samples_view.to_json()), name
        assert View.from_dict(document) == samples_view
        ours = saved(tab, view, "CSV").decode().splitlines()
        theirs = to_csv(samples_view).splitlines()
        assert [_numbers(line) for line in ours] == [_numbers(line) for line in theirs], name
        if name in ("wide", "lines", "texts"):  # a canvas, shapes, words
            svg = saved(tab, view, "SVG").decode()
            assert svg.startswith("<svg") and "</svg>" in svg
            assert "<script" not in svg and "foreignObject" not in svg
            assert saved(tab, view, "PNG").startswith(b"\x89PNG")
    tab.quiet()


def _numbers(line: str) -> list[str]:
    """CSV cells with numbers written in one way (JavaScript has no 1.0)."""
    cells = []
    for cell in line.split(","):
        try:
            cells.append(repr(float(cell)))
        except ValueError:
            cells.append(cell)
    return cells


def test_svg_shows_cells_where_they_are(tab: Tab) -> None:
    view = tab.draw(grid([[1.0, -1.0]], rows=["a"], cols=["b", "שלום"], title="Effect"))
    svg = saved(tab, view, "SVG").decode()
    assert svg.count('fill="rgb(33, 102, 172)"') == 1
    assert svg.count('fill="rgb(178, 24, 43)"') == 1
    for word in ("Effect", "+1.00", "−1.00", "שלום"):
        assert f">{word}</text>" in svg


def test_what_is_folded_is_not_exported(tab: Tab) -> None:
    labels = [f"part {i}" for i in range(50)]
    svg = saved(tab, tab.draw(bars(labels, range(50))), "SVG").decode()
    assert ">part 39</text>" in svg and ">part 40</text>" not in svg


def test_maximise_and_back(tab: Tab, samples: dict[str, View]) -> None:
    view = tab.draw(samples["wide"])
    button = view.locator("> .uh-tools .uh-max")
    button.click()
    box = view.bounding_box()
    size = tab.page.viewport_size
    assert box is not None and size is not None
    assert (box["width"], box["height"]) == (size["width"], size["height"])
    assert button.get_attribute("aria-pressed") == "true"
    view.locator(".uh-plate").click()
    tab.page.keyboard.press("Escape")
    assert tab.page.evaluate("underhood1.selection.get().locked") is True, "one thing at a time"
    assert not view.evaluate("(e) => e.matches(':popover-open')")
    assert button.get_attribute("aria-pressed") == "false"


def test_tables_sort(tab: Tab) -> None:
    view = tab.draw(table(["who", "much"], [["a", 2.0], ["b", None], ["c", 10.0], ["d", -1.0]]))
    first = view.locator("tbody th")
    head = view.get_by_role("button", name="much")
    head.click()
    assert first.all_inner_texts() == ["c", "a", "d", "b"]
    head.click()
    assert first.all_inner_texts() == ["d", "a", "c", "b"]
    head.click()
    assert first.all_inner_texts() == ["a", "b", "c", "d"]


def test_folded_groups_draw_when_opened(tab: Tab, samples: dict[str, View]) -> None:
    view = tab.draw(samples["group"])
    assert view.locator(".uh-strip").count() == 0
    view.locator("summary").first.click()
    view.locator(".uh-strip").wait_for()
    assert view.locator(".uh-strip .uh-chip").count() == 15


def test_graph_prunes_and_lists_a_node(tab: Tab, samples: dict[str, View]) -> None:
    view = tab.draw(samples["graph"])
    slider = view.locator("input[type=range]")
    all_edges = view.locator(".uh-wires path").count()
    slider.fill("0")
    assert view.locator(".uh-wires path").count() == 1 < all_edges
    view.locator(".uh-node").first.click()
    assert view.locator(".uh-four > div").count() == 4
    assert view.locator(".uh-own path").count() == 1


def test_arrow_keys_walk_the_graph(tab: Tab) -> None:
    nodes = [{"id": "in", "y": 0, "x": 1}, {"id": "out", "y": 2, "x": 1},
             *({"id": f"m{x}", "y": 1, "x": x} for x in range(3))]  # fmt: skip
    view = tab.draw(graph(nodes, [("in", f"m{x}", 1.0) for x in range(3)]
                          + [(f"m{x}", "out", -1.0) for x in range(3)]))  # fmt: skip
    net = view.locator(".uh-net")
    net.focus()
    seen = []
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp"):
        net.press(key)
        seen.append(view.locator(".uh-readout").inner_text().partition(";")[0])
    assert seen == ["out", "m1", "m2", "m2", "in", "m1"]


def test_fifty_thousand_edges(tab: Tab) -> None:
    rng = np.random.default_rng(3)
    nodes = [{"id": f"a{y}.h{x}", "y": y, "x": x} for y in range(80) for x in range(64)]
    ends = np.sort(rng.integers(0, len(nodes), (50_000, 2)), axis=1)
    edges = [(nodes[a]["id"], nodes[b]["id"], w)
             for (a, b), w in zip(ends, rng.normal(0, 1, 50_000), strict=True)]  # fmt: skip
    view = tab.draw(graph(nodes, edges))
    assert view.locator(".uh-wires path").count() == 200
    view.locator("input[type=range]").fill("100")
    assert "50,000 of 50,000 edges" in view.inner_text()
    canvas = view.locator("canvas.uh-wires")
    painted = canvas.evaluate(
        "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((x) => x)"
    )
    assert painted
    tab.quiet()


def test_long_and_many(tab: Tab) -> None:
    rng = np.random.default_rng(4)
    view = tab.draw(tokens([f" t{i}" for i in range(10_000)], rng.normal(0, 1, 10_000)))
    assert view.locator(".uh-chip").count() == 10_000
    values = rng.normal(0, 1, (80, 64))
    view = tab.draw(grid(values, rows=range(80), cols=range(64), row_name="layer", col_name="head"))
    plate = view.locator(".uh-plate")
    box = plate.bounding_box()
    assert box is not None
    plate.hover(position={"x": box["width"] * (10.5 / 64), "y": box["height"] * (70.5 / 80)})
    assert view.locator(".uh-readout").inner_text().startswith("layer 70, head 10: ")
    assert tab.page.evaluate("underhood1.selection.get().head") == 10
    patterns = {f"{i}.{j}": np.tril(np.ones((20, 20))) / 20 for i in range(12) for j in range(12)}
    view = tab.draw(heads([" a"] * 20, patterns))
    assert view.locator(".uh-thumb").count() == 144
    assert view.locator(".uh-head").count() == 1
    view.locator(".uh-thumb").nth(17).click()
    assert view.locator(".uh-head .uh-label").inner_text() == "1.5"
    tab.quiet()


def test_states_of_a_panel(tab: Tab, samples: dict[str, View]) -> None:
    tab.draw(samples["sentences"])
    told = tab.page.evaluate(
        """async (view) => {
          const panel = document.createElement('uh1-panel');
          document.body.append(panel);
          const told = [];
          const states = [
            {phase: 'empty'}, {phase: 'queued', ahead: 2},
            {phase: 'running', step: 'Patching', done: 3, total: 48},
            {phase: 'failed', message: 'Out of memory.', hint: 'Use a shorter prompt.'},
          ];
          for (const state of states) {
            panel.state = state;
            await panel.updateComplete;
            told.push(panel.innerText.replace(/\\s+/g, ' ').trim());
          }
          Object.assign(panel, {view, state: {phase: 'done'}});
          await panel.updateComplete;
          told.push(panel.firstElementChild.localName);
          return told;
        }""",
        samples["sentences"].to_dict(),
    )
    assert told == [
        "Nothing here yet.",
        "Waiting for 2 other jobs.",
        "Patching: 3 of 48",
        "Out of memory. Use a shorter prompt.",
        "uh1-sentences",
    ]


def test_a_view_that_cannot_be_drawn_says_so(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    view = tab.draw(tokens(["a"]))
    tab.page.evaluate("(e) => { e.view = {kind: 'tokens', tokens: 3}; }", view.element_handle())
    view.get_by_text("could not be drawn").wait_for()
    assert len(tab.told) == 1 and "could not be drawn" in tab.told[0]
