"""The logarithmic scale of colours: a choice of the reader, in the page alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from browser_kit import NEEDS_CHROMIUM, Tab, browser, saved
from underhood.view import View, diff, feature, grid, group, tokens
from underhood.view.colour import Scale, cell_colour, hex_of, limits_of

pytestmark = NEEDS_CHROMIUM

COLOURS = (
    "([values, scale, log]) => { const l = underhood1.limitsOf(values, scale, null, log);"
    " return values.map((v) => underhood1.colourOf(v, l)); }"
)


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as make:
        yield make(accept_downloads=True)


def lightness(colour: str) -> float:
    return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) / 765


def colours(tab: Tab, values: list[float], scale: Scale, *, log: bool) -> list[str]:
    return tab.page.evaluate(COLOURS, [values, scale, log])


def toggle(view: Any) -> Any:
    return view.locator("> .uh-tools .uh-log")


def test_zero_and_the_ends_keep_their_colours(tab: Tab) -> None:
    tab.draw(tokens(["a"]))
    for values in ([-2.0, 0.0, 2.0], [0.0, 2.0]):
        for scale in ("diverging", "sequential"):
            limits = limits_of(values, scale)
            static = [cell_colour(v, limits) for v in values]
            assert colours(tab, values, scale, log=True) == static


def test_small_values_show_more_and_in_order(tab: Tab) -> None:
    tab.draw(tokens(["a"]))
    sizes = [1.0, 0.3, 0.1, 0.03, 0.01]
    for scale in ("diverging", "sequential"):
        plain = [lightness(c) for c in colours(tab, sizes, scale, log=False)]
        bent = [lightness(c) for c in colours(tab, sizes, scale, log=True)]
        assert bent == sorted(bent), "the larger a value, the darker"
        assert all(b < p - 0.02 for b, p in zip(bent[1:], plain[1:], strict=True))


def test_a_signed_scale_is_symmetric_around_zero(tab: Tab) -> None:
    tab.draw(tokens(["a"]))
    sizes = np.geomspace(1e-3, 1, 60)
    found = colours(tab, [*sizes.tolist(), *(-sizes).tolist()], "diverging", log=True)
    palette = [hex_of(i, "diverging") for i in range(255)]
    steps = [palette.index(colour) - 127 for colour in found]
    assert len(set(steps[:60])) > 40
    assert steps[:60] == [-step for step in steps[60:]]


def test_probabilities_stay_as_they_are(tab: Tab, samples: dict[str, View]) -> None:
    tab.draw(tokens(["a"]))
    values = [0.01, 0.5, 1.0]
    assert colours(tab, values, "probability", log=True) == colours(
        tab, values, "probability", log=False
    )
    assert toggle(tab.draw(samples["lens"])).count() == 0
    assert toggle(tab.draw(samples["bars"])).count() == 0
    assert toggle(tab.draw(tokens(["a"]))).count() == 0, "nothing is coloured"


def style(mark: Any) -> str:
    return mark.evaluate("(e) => getComputedStyle(e).backgroundColor")


def test_the_reader_turns_it_on_and_off(tab: Tab, samples: dict[str, View]) -> None:
    view = tab.draw(samples["tokens"], samples["tokens"])
    button, small = toggle(view), view.locator("[data-at='0,2']")
    other = tab.page.locator("body > .uh-view").nth(1)
    before, words = style(small), small.inner_text()
    assert "linear colours" in view.locator(".uh-legend").inner_text()
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert style(small) != before and small.inner_text() == words, "the number is the same"
    # (sqrt(1 + 99) - 1) / 99 of the limit, which is 1.8.
    assert "logarithmic colours: half the colour is ±0.164" in (
        view.locator(".uh-legend").inner_text()
    )
    assert style(other.locator("[data-at='0,2']")) == before, "each view has its own choice"
    button.focus()
    button.press("Enter")
    assert style(small) == before
    tab.quiet()


def test_claim_and_control_keep_one_scale(tab: Tab) -> None:
    value = [[1.0, 0.05]]
    control = grid([[0.05, 0.02]], rows=["a"], cols=["b", "c"], unit="nats")
    view = tab.draw(grid(value, rows=["a"], cols=["b", "c"], unit="nats", control=control))
    ours = view.locator(".uh-claim td[data-at='0,1']")
    theirs = view.locator(".uh-control td[data-at='0,0']")
    linear = style(ours)
    assert linear == style(theirs)
    toggle(view).press("Space")
    assert style(ours) == style(theirs) != linear
    assert view.locator(".uh-legend").all_inner_texts()[0] == (
        view.locator(".uh-control .uh-legend").inner_text()
    )
    assert view.locator(".uh-log").count() == 1, "one choice for both"
    tab.quiet()


def test_canvas_diff_card_and_picture_follow(tab: Tab, samples: dict[str, View]) -> None:
    pixels = (
        "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        ".reduce((h, x) => (h * 31 + x) | 0, 0)"
    )
    for name in ("wide", "picture"):
        view = tab.draw(samples[name])
        canvas = view.locator("canvas").first
        before = canvas.evaluate(pixels)
        toggle(view).click()
        assert canvas.evaluate(pixels) != before, name
        toggle(view).click()
        assert canvas.evaluate(pixels) == before, name
    chips = tokens(["a", "b"], [1.0, 0.05], unit="nats")
    for document in (diff(chips, tokens(["a", "b"], [0.5, 0.5], unit="nats")),
                     feature([{"tokens": ["a", "b"], "values": [1.0, 0.05]}])):  # fmt: skip
        view = tab.draw(document)
        small = view.locator("[data-at='0,1']").first
        before = style(small)
        toggle(view).click()
        assert style(small) != before
        told = view.locator(".uh-legend").all_inner_texts()
        assert told and all("logarithmic colours" in text for text in told)
    tab.quiet()


def test_views_of_a_group_choose_for_themselves(tab: Tab) -> None:
    strips = [tokens(["a", "b"], [1.0, 0.05]) for _ in range(2)]
    view = tab.draw(group(strips))
    view.locator(".uh-log").first.click()
    assert [b.get_attribute("aria-pressed") for b in view.locator(".uh-log").all()] == [
        "true",
        "false",
    ]


def test_exports_show_the_scale_and_keep_the_document(tab: Tab) -> None:
    document = tokens(["a", "b"], [1.0, 0.05], title="Strip")
    view = tab.draw(document)
    toggle(view).click()
    svg = saved(tab, view, "SVG").decode()
    assert "logarithmic colours" in svg
    assert View.from_json(saved(tab, view, "JSON")) == document
