"""Heads in the reader's order, by what they do with the tokens that are shown."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import underhood as uh
from browser_kit import NEEDS_CHROMIUM, Tab, browser
from underhood.core.names import head_named
from underhood.view import View, heads
from underhood.view.doc import Group, Heads

pytestmark = NEEDS_CHROMIUM

TOKENS = ["<s>", " a", " b", " a", " b", " a"]
N = len(TOKENS)
ORDERS = [
    "the list",
    "entropy, focused first",
    "weight on the token before",
    "weight on the first token",
    "weight on the same token before",
    "weight on what followed the same token (induction)",
]


def looks(keys: dict[int, int], share: float = 0.9) -> np.ndarray:
    """Each query looks at one key with this weight, and at itself with the rest."""
    pattern = np.eye(N)
    for q, k in keys.items():
        pattern[q] *= 1 - share
        pattern[q, k] += share
    return pattern


KNOWN = {
    "0.0": np.tril(np.ones((N, N))) / np.arange(1, N + 1)[:, None],
    "0.1": looks({q: q - 1 for q in range(1, N)}),
    "0.2": looks(dict.fromkeys(range(1, N), 0)),
    "0.3": looks({q: q - 2 for q in range(3, N)}),
    "0.4": looks({3: 2, 4: 3, 5: 2}, 0.95),
}


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as make:
        yield make()


def labels(view: Any) -> list[str]:
    return view.locator(".uh-head .uh-label").all_inner_texts()


def test_heads_stand_in_the_order_that_is_chosen(tab: Tab) -> None:
    view = tab.draw(heads(TOKENS, KNOWN))
    choice = view.get_by_label("in order of")
    assert choice.locator("option").all_inner_texts() == ORDERS
    firsts = ["0.0"]
    for order in ORDERS[1:]:
        choice.select_option(order)
        firsts.append(labels(view)[0])
    assert firsts[2:] == ["0.1", "0.2", "0.3", "0.4"]
    choice.select_option(ORDERS[1])
    assert labels(view)[-1] == "0.0", "looking at all alike has the most entropy"
    choice.select_option("the list")
    assert labels(view) == list(KNOWN)
    assert view.locator(".uh-score").count() == 0
    tab.quiet()


def test_scores_are_those_of_the_definitions(tab: Tab) -> None:
    view = tab.draw(heads(TOKENS, KNOWN))
    choice = view.get_by_label("in order of")
    told = {}
    for order in ORDERS[2:]:
        choice.select_option(order)
        names, scores = labels(view), view.locator(".uh-score").all_inner_texts()
        told[order] = {n: float(s.split(": ")[1]) for n, s in zip(names, scores, strict=True)}
    assert told[ORDERS[2]]["0.1"] == pytest.approx(0.9, abs=0.005)
    assert told[ORDERS[3]]["0.2"] == pytest.approx(0.9, abs=0.005)
    assert told[ORDERS[4]]["0.3"] == pytest.approx(0.9, abs=0.005)
    # Uniform weight on `q + 1` keys; the same token stands earlier once at 3 and 4, twice at 5.
    assert told[ORDERS[4]]["0.0"] == pytest.approx((1 / 4 + 1 / 5 + 2 / 6) / 3, abs=0.005)
    # What followed it: position 2 for 3, 3 for 4, 2 and 4 for 5.
    assert told[ORDERS[5]]["0.0"] == pytest.approx((1 / 4 + 1 / 5 + 2 / 6) / 3, abs=0.005)


def test_entropy_is_that_of_the_method(tab: Tab) -> None:
    result = uh.read.attention(uh.load(), "The capital of France is", show=100)
    assert isinstance(result.view, Group)
    shown = next(v for v in result.view.views if isinstance(v, Heads))
    view = tab.draw(shown)
    view.get_by_label("in order of").select_option(ORDERS[1])
    thumbs = view.locator(".uh-thumb > span:last-child").all_inner_texts()
    assert len(thumbs) == len(shown.heads) > 12
    found = [(text.split()[0], float(text.split()[1])) for text in thumbs]
    mean = result["mean_entropy"]
    for label, entropy in found:
        layer, head = head_named(label)
        assert entropy == pytest.approx(float(mean.sel(layer=layer, head=head)), abs=0.006)
    assert [e for _, e in found] == sorted(e for _, e in found)


def test_a_repeat_is_needed_to_ask_for_repeats(tab: Tab, samples: dict[str, View]) -> None:
    view = tab.draw(heads(["a", "b", "c"], {"0.0": np.eye(3), "0.1": np.eye(3)}))
    assert view.get_by_label("in order of").locator("option").count() == 4
    assert tab.draw(heads(["a"], {"0.0": [[1.0]]})).locator("select").count() == 0


def test_the_keyboard_orders_and_walks_through_what_is_seen(tab: Tab) -> None:
    view = tab.draw(heads(TOKENS, KNOWN))
    view.get_by_label("in order of").focus()
    for _ in range(4):
        tab.page.keyboard.press("ArrowDown")
    order = labels(view)
    assert order[0] == "0.3"
    view.locator(".uh-plate").first.focus()
    for _ in range(N):
        tab.page.keyboard.press("ArrowDown")
    assert view.locator(".uh-readout").inner_text().startswith("0.3: ·a (5)")
    tab.page.keyboard.press("ArrowDown")
    assert view.locator(".uh-readout").inner_text().startswith(f"{order[1]}: <s> (0)")
    tab.quiet()


def test_of_many_heads_the_keys_stay_in_the_large_one(tab: Tab) -> None:
    many = {f"0.{i}": pattern for i, pattern in enumerate(list(KNOWN.values()) * 3)}
    view = tab.draw(heads(TOKENS, many))
    view.get_by_label("in order of").select_option(ORDERS[2])
    first = view.locator(".uh-thumb").first
    assert first.inner_text().split() == ["0.1", "0.90"]
    plate, button = first.locator(".uh-plate").bounding_box(), first.bounding_box()
    assert plate is not None and button is not None
    assert plate["width"] > 0.8 * button["width"], "the picture fills its thumbnail"
    view.locator(".uh-thumb", has_text="0.7").click()
    assert labels(view) == ["0.7"]
    view.locator(".uh-plate[data-plate]").focus()
    for _ in range(N + 3):
        tab.page.keyboard.press("ArrowDown")
    assert view.locator(".uh-readout").inner_text().startswith("0.7: ·a (5)")
