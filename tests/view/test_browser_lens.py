"""A lens grid in the reader's hands: other measures, candidates, a token over the layers."""

from collections.abc import Iterator
from typing import Any

import pytest

from browser_kit import NEEDS_CHROMIUM, Tab, browser
from underhood.view import View, grid
from underhood.view.colour import cell_colour, limits_of

pytestmark = NEEDS_CHROMIUM

LENS = grid(
    [[0.1, 0.2], [0.3, 0.4], [0.9, 0.8]],
    rows=["embed", "0", "1"], cols=[" a", " b"], row_name="layer", col_name="pos",
    text=[["x", "y"], ["y", "x"], ["x", "z"]], scale="probability", unit="probability",
    measures=[{"name": "rank", "values": [[40.0, 3.0], [2.0, 1.0], [0.0, 0.0]], "unit": "above"},
              {"name": "surprise", "values": [[-2.0, 1.0], [0.5, 0.0], [0.25, 1.0]],
               "unit": "nats", "scale": "diverging"}],
    candidates={
        "tokens": ["x", "y", "z"],
        "ids": [[[0, 1], [1, 0]], [[1, 2], [0, 2]], [[0, 2], [2, 0]]],
        "values": [[[0.5, 0.25], [0.5, 0.125]], [[0.75, 0.125], [0.5, 0.25]],
                   [[0.875, 0.0625], [0.75, 0.125]]],
    },
    title="Lens",
)  # fmt: skip


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as make:
        yield make(accept_downloads=True)


def candidates(view: Any) -> list[str]:
    return [item.inner_text().replace("\n", " ") for item in view.locator(".uh-behind li").all()]


def lines(view: Any) -> list[dict[str, Any]]:
    chart = view.locator(".uh-behind uh1-lines")
    return chart.evaluate("(e) => e.view.series") if chart.count() else []


def test_a_click_shows_the_candidates_and_the_token_over_layers(tab: Tab) -> None:
    view = tab.draw(LENS)
    assert view.locator(".uh-behind").count() == 0
    view.locator("[data-at='1,0']").click()
    assert candidates(view) == ["y 0.750", "z 0.125"]
    # y is second in the embedding, first in layer 0, and below the second of layer 1.
    assert lines(view) == [
        {"name": "y", "values": [0.25, 0.75, None], "low": [0.25, 0.75, 0],
         "high": [0.25, 0.75, 0.0625]},
    ]  # fmt: skip
    assert "not among the 2 likeliest" in view.locator(".uh-behind").inner_text()
    view.locator("[data-at='2,0']").click()
    assert candidates(view) == ["x 0.875", "z 0.062"]
    tab.page.keyboard.press("Escape")
    assert view.locator(".uh-behind").count() == 0
    tab.quiet()


def test_by_keyboard_and_the_token_that_is_followed(tab: Tab) -> None:
    view = tab.draw(LENS)
    view.locator(".uh-scroll").focus()
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        tab.page.keyboard.press(key)
    follow = view.locator(".uh-behind button").nth(1)
    follow.focus()
    tab.page.keyboard.press("Enter")
    assert follow.get_attribute("aria-pressed") == "true"
    assert [line["name"] for line in lines(view)] == ["y", "z"]
    # It is followed into another cell, where it is drawn beside that cell's own first token.
    view.locator("[data-at='0,1']").click()
    assert [line["name"] for line in lines(view)] == ["y", "z"]
    view.locator("[data-at='2,1']").click()
    assert [line["name"] for line in lines(view)] == ["z"]
    view.get_by_role("button", name="z", exact=True).click()
    view.locator("[data-at='0,1']").click()
    assert [line["name"] for line in lines(view)] == ["y"]


def test_the_chart_can_be_pointed_at_without_losing_the_cell(tab: Tab) -> None:
    view = tab.draw(LENS)
    view.locator("[data-at='1,0']").click()
    view.locator(".uh-behind .uh-area").click()
    assert tab.page.evaluate("underhood1.selection.get().layer") == 0
    assert candidates(view) == ["y 0.750", "z 0.125"]
    tab.page.keyboard.press("Escape")
    assert view.locator(".uh-behind").count() == 0


def test_cells_can_be_coloured_by_another_measure(tab: Tab) -> None:
    view = tab.draw(LENS)
    choice = view.get_by_label("colour by")
    assert choice.locator("option").all_inner_texts() == ["probability", "rank", "surprise"]
    cell = view.locator("[data-at='0,0']")
    assert view.locator("> .uh-tools .uh-log").count() == 0
    choice.select_option("surprise")
    assert cell.inner_text().split() == ["x", "−2.00"]
    wanted = cell_colour(-2.0, limits_of([[-2.0, 1.0], [0.5, 0.0], [0.25, 1.0]], "diverging"))
    rgb = ", ".join(str(int(wanted[i : i + 2], 16)) for i in (1, 3, 5))
    assert cell.evaluate("(e) => getComputedStyle(e).backgroundColor") == f"rgb({rgb})"
    assert "surprise (nats)" in view.locator(".uh-legend").inner_text()
    assert view.locator("> .uh-tools .uh-log").count() == 1, "a signed scale has a log form"
    cell.hover()
    assert view.locator(".uh-readout").inner_text() == "layer embed, pos ·a: −2.00 nats (x)"
    choice.focus()
    tab.page.keyboard.press("ArrowUp")
    tab.page.keyboard.press("ArrowUp")
    assert cell.inner_text().split() == ["x", "0.10"]
    tab.quiet()


def test_a_control_is_not_shown_beside_numbers_it_does_not_control(tab: Tab) -> None:
    control = grid([[0.0] * 2] * 3, rows=list("abc"), cols=list("de"), scale="probability")
    view = tab.draw(LENS.model_copy(update={"control": control}))
    assert view.locator(".uh-control").count() == 1
    view.get_by_label("colour by").first.select_option("rank")
    assert view.locator(".uh-control").count() == 0
    view.get_by_label("colour by").first.select_option("probability")
    assert view.locator(".uh-control").count() == 1


def test_a_large_lens_is_pointed_at_on_its_canvas(tab: Tab) -> None:
    rows, cols = 12, 80
    ids = [[[0, 1]] * cols] * rows
    values = [[[0.5, 0.25]] * cols] * rows
    large = grid([[0.5] * cols] * rows, rows=range(rows), cols=range(cols), scale="probability",
                 candidates={"tokens": ["x", "y"], "ids": ids, "values": values})  # fmt: skip
    view = tab.draw(large)
    view.locator(".uh-plate").click(position={"x": 30, "y": 30})
    assert candidates(view) == ["x 0.500", "y 0.250"]
    tab.quiet()


def test_old_grids_have_neither(tab: Tab, samples: dict[str, View]) -> None:
    view = tab.draw(samples["grid"])
    view.locator("[data-at='4,10']").first.click()
    assert view.locator(".uh-behind, select").count() == 0
