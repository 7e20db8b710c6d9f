"""The pages in a real browser, against `underhood serve` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

import underhood as uh
from browser_kit import AXE, NEEDS_CHROMIUM, Tab, browser

pytestmark = NEEDS_CHROMIUM

PAGES = ("explain", "look", "cause", "change", "methods", "results", "model")
_SERIOUS = """
(rules) => axe.run(document, {resultTypes: ['violations'], ...(rules && {runOnly: rules})})
  .then((r) => r.violations
  .filter((v) => ['serious', 'critical'].includes(v.impact))
  .map((v) => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200), v.nodes[0].failureSummary]))
"""
_ESCAPES = """
() => [...document.querySelectorAll('main *, aside *')].filter((e) => {
  const box = e.getBoundingClientRect();
  const held = e.closest('.uh-scroll, .uh-hidden, details:not([open]), datalist, svg');
  return !held && box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map((e) => e.tagName + '.' + e.className)
"""


class Desk(Tab):
    """A tab of the workbench."""

    def __init__(self, page: Any, address: str) -> None:
        super().__init__(page)
        self.base, _, self.token = address.partition("?token=")
        page.set_default_timeout(60_000)
        page.goto(address)
        page.locator("main h1").wait_for()

    def go(self, page: str, **fields: Any) -> None:
        """Follow a link to a page in some state."""
        said = {"page": page, "model": "village", "with": fields}
        self.page.goto("about:blank")
        self.page.goto(f"{self.base}#{quote(json.dumps(said))}")
        self.page.locator("main h1").wait_for()

    def press(self, name: str) -> None:
        """Press a button and wait until nothing runs."""
        self.page.get_by_role("button", name=name, exact=True).click()
        self.page.locator(".wb-done").first.wait_for()

    def quiet(self) -> None:
        """Nothing went wrong, and nothing was asked of anyone else."""
        assert self.told == []
        ours = (self.base, "data:", "blob:", "about:")
        assert [url for url in self.asked if not url.startswith(ours)] == []


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `underhood serve` prints; Ctrl-C ends it without a complaint."""
    folder = tmp_path_factory.mktemp("served")
    words = ["serve", "village", "--no-open", "--port", "0", "--results", str(folder), "-q"]
    server = subprocess.Popen(
        [sys.executable, "-m", "underhood.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.send_signal(signal.SIGINT)
    assert (server.wait(20), server.communicate()[1]) == (0, "")


@pytest.fixture(scope="module")
def open_desk(address: str) -> Iterator[Callable[..., Desk]]:
    with browser() as tab:
        yield lambda **options: Desk(tab(**options).page, address)


@pytest.fixture(scope="module")
def desk(open_desk: Callable[..., Desk]) -> Desk:
    return open_desk()


def test_a_newcomer_has_one_thing_to_press(desk: Desk, pair: dict) -> None:
    assert desk.token not in desk.page.url, "the secret leaves the address"
    assert desk.page.get_by_label("Prompt", exact=True).input_value() == pair["prompt"]
    assert desk.page.get_by_role("button", name="Explain", exact=True).is_enabled()
    desk.page.locator(".wb-pieces", has_text="tokens of").first.wait_for()
    desk.quiet()


def test_explain_fills_part_by_part_and_comes_back(desk: Desk) -> None:
    desk.go("explain")
    desk.page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => {"
        " const n = document.querySelectorAll('.wb-report .uh-section').length;"
        " const busy = Boolean(document.querySelector('.wb-running'));"
        " if (n && n !== window.seen.at(-1)?.[0]) window.seen.push([n, busy]);"
        "}).observe(document.body, {childList: true, subtree: true}); }"
    )
    desk.press("Explain")
    seen = desk.page.evaluate("window.seen")
    assert seen[-1][0] == 8 and seen[0][1], "the first part is there while others are being found"
    assert len(seen) > 3
    words = desk.page.locator(".wb-report").inner_text()
    desk.page.reload()
    desk.page.locator(".wb-report .uh-section").nth(7).wait_for()
    assert desk.page.locator(".wb-report").inner_text() == words
    desk.quiet()


def test_a_selection_is_shared_until_it_is_freed(desk: Desk) -> None:
    desk.go("look")
    desk.press("Look")
    chip = desk.page.locator("uh1-tokens .uh-chip").nth(2)
    chip.click()
    chosen = desk.page.locator(".wb-inspect")
    chosen.filter(has_text="kept").wait_for()
    assert "Position" in chosen.inner_text()
    desk.page.mouse.move(5, 5)
    assert desk.page.locator("uh1-grid .uh-linked").count() > 0, "the lens follows"
    desk.page.keyboard.press("Escape")
    chosen.filter(has_not_text="kept").wait_for(state="attached")
    desk.page.get_by_label("Site").fill("z.1.0")
    desk.press("Read")
    desk.page.locator(".wb-tool .uh-view").first.wait_for()
    desk.quiet()


def test_a_slider_writes_new_text(desk: Desk, model: uh.Model, pair: dict) -> None:
    edit = {"site": "resid_post.1", "op": "scale", "fields": {"factor": 0.0}, "strength": 0.1,
            "unit": "raw"}  # fmt: skip
    desk.go("change", prompt=pair["prompt"], tokens=4, columns=[{"label": "a", "edits": [edit]}])
    desk.press("Write")
    texts = desk.page.locator(".wb-text")

    def written(strength: float) -> str:
        change = uh.Edit("resid_post.1", uh.scale(0.0), strength=strength)
        made = model.generate(pair["prompt"], max_new_tokens=4, edits=change)
        return "".join("".join(made.strings[0]).split())

    def shown(i: int) -> str:
        return "".join(texts.nth(i).inner_text().split())

    assert shown(1) == written(0.1)
    unedited = shown(0)
    assert unedited == "".join(
        "".join(model.generate(pair["prompt"], max_new_tokens=4).strings[0]).split()
    )
    assert written(2.0) != written(0.1), "the slider must have something to change"
    slider = desk.page.get_by_label("Strength", exact=True)
    slider.focus()
    slider.press("End")
    desk.page.wait_for_function(
        "wanted => [...document.querySelectorAll('.wb-text')][1].innerText.replace(/\\s+/g, '')"
        " === wanted", arg=written(2.0),
    )  # fmt: skip
    assert shown(0) == unedited
    desk.quiet()


def test_a_circuit_loses_a_node(desk: Desk, pair: dict) -> None:
    desk.go("cause", tool="circuit", **pair)
    desk.press("Find the circuit")
    before = desk.page.locator(".wb-judged dd").all_inner_texts()
    name = desk.page.locator(".wb-lists section").first.locator("code").last.inner_text()
    desk.page.get_by_role("button", name=f"drop {name}", exact=True).click()
    desk.page.locator(".wb-chip").wait_for()
    desk.page.wait_for_function(
        "was => document.querySelector('.wb-done')"
        " && document.querySelectorAll('.wb-judged dd')[4].innerText !== was", arg=before[4],
    )  # fmt: skip
    assert quote(name, safe="") in desk.page.url.replace("%22", "") or "drop" in desk.page.url
    desk.quiet()


def test_every_method_has_a_form(desk: Desk) -> None:
    desk.go("methods", method="logit_lens")
    desk.press("Run")
    desk.page.locator(".wb-card .uh-view").first.wait_for()
    desk.go("results")
    first = desk.page.locator(".wb-results tbody .wb-link").first
    assert first.inner_text() == "logit lens"
    first.click()
    desk.page.locator(".wb-report .uh-view").first.wait_for()
    desk.quiet()


def test_markup_in_a_prompt_is_text(desk: Desk) -> None:
    evil = '<img src=x onerror="window.hurt = 1"><script>window.hurt = 1</script>\u202e'
    for page in PAGES[:4]:
        desk.go(
            page, prompt=evil, contrast=evil, answer=evil, columns=[{"label": evil, "edits": []}]
        )
        desk.page.locator(".wb-run").first.click()
        desk.page.locator(".wb-problem, .wb-done").first.wait_for()
    assert desk.page.evaluate("window.hurt") is None
    assert desk.page.locator("main img").count() == 0
    desk.quiet()


def test_what_is_wrong_is_said_in_the_page(desk: Desk) -> None:
    desk.go("look", prompt=" ".join(["Mary"] * 10_000))
    desk.page.get_by_role("button", name="Look", exact=True).click()
    alert = desk.page.get_by_role("alert")
    alert.wait_for()
    assert "context" in alert.inner_text() and "Instead" in alert.inner_text()
    desk.page.locator(".wb-pieces", has_text="too long").wait_for()
    desk.page.goto("about:blank")
    desk.page.goto(f"{desk.base}#%7Bnonsense")
    desk.page.locator("main h1", has_text="Explain").wait_for()
    desk.quiet()


def test_two_tabs_do_not_mix(open_desk: Callable[..., Desk], pair: dict) -> None:
    tabs = [open_desk(), open_desk()]
    prompts = [pair["prompt"], pair["contrast"]]
    for tab, prompt in zip(tabs, prompts, strict=True):
        tab.go("look", prompt=prompt)
        tab.page.get_by_role("button", name="Look", exact=True).click()
    for tab, prompt in zip(tabs, prompts, strict=True):
        tab.page.locator(".wb-done").wait_for()
        words = tab.page.locator("uh1-tokens .uh-chip").evaluate_all(
            "all => all.map((c) => c.firstChild.textContent.trim())"
        )
        assert [w for w in prompt.replace(",", " ,").split() if w not in words] == []
        tab.quiet()
        tab.page.context.close()


def test_no_page_is_cut_off_or_bars_anyone(open_desk: Callable[..., Desk]) -> None:
    """At every width; in the dark only the colours differ."""
    tab = open_desk()
    axe = AXE.read_text(encoding="utf-8")
    over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    for page in PAGES:
        tab.go(page)
        for width in (390, 1280, 2560):
            tab.page.set_viewport_size({"width": width, "height": 900})
            assert tab.page.evaluate(over) <= 0, f"{page} scrolls sideways at {width} px"
            assert tab.page.evaluate(_ESCAPES) == [], f"{page} is cut off at {width} px"
        assert tab.page.get_by_role("heading", level=1).count() == 1
        tab.page.evaluate(axe)
        assert tab.page.evaluate(_SERIOUS, None) == [], page
        tab.page.emulate_media(color_scheme="dark")
        assert tab.page.evaluate(_SERIOUS, ["color-contrast"]) == [], f"{page} in the dark"
        tab.page.emulate_media(color_scheme="light")
    tab.quiet()
    tab.page.context.close()


def test_a_model_of_pictures_has_pages_too(open_desk: Callable[..., Desk]) -> None:
    """Without a tokenizer nothing is filled in, and every page still says what there is."""
    tab = open_desk()
    tab.page.locator(".wb-side select").select_option("sight/cnn")
    for page in PAGES:
        tab.page.goto(f"{tab.base}#{quote(json.dumps({'page': page, 'model': 'sight/cnn'}))}")
        tab.page.locator("main h1").wait_for()
        assert tab.page.locator(".wb-problem").count() == 0, page
    tab.page.get_by_text("ResNetForImageClassification").first.wait_for()
    tab.go("explain", prompt=[1, {"not": "text"}], contrast=5, job={"a": 1})
    tab.page.locator("main h1").wait_for()
    tab.quiet()
    tab.page.context.close()
