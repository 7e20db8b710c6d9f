"""The pages in a real browser, against `underhood serve` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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


@contextmanager
def served(folder: Path, model: str = "village") -> Iterator[str]:
    """What `underhood serve` prints; Ctrl-C ends it without a complaint."""
    words = ["serve", model, "--no-open", "--port", "0", "--results", str(folder), "-q"]
    server = subprocess.Popen(
        [sys.executable, "-m", "underhood.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGINT)
        assert (server.wait(20), server.communicate()[1]) == (0, "")
    finally:
        server.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture(scope="module")
def open_desk(address: str) -> Iterator[Callable[..., Desk]]:
    with browser() as tab:
        yield lambda at=address, **options: Desk(tab(**options).page, at)


@pytest.fixture(scope="module")
def desk(open_desk: Callable[..., Desk]) -> Desk:
    return open_desk()


def test_a_newcomer_has_one_thing_to_press(desk: Desk, pair: dict) -> None:
    assert desk.token not in desk.page.url, "the secret leaves the address"
    assert desk.page.get_by_label("Prompt", exact=True).input_value() == pair["prompt"]
    assert desk.page.get_by_role("button", name="Explain", exact=True).is_enabled()
    desk.page.locator(".wb-pieces", has_text="tokens of").first.wait_for()
    desk.quiet()


def test_explain_fills_part_by_part_and_comes_back(desk: Desk, pair: dict) -> None:
    # Long and different from the start, so that a second lies between some parts.
    before = " ".join(
        ["Then Anna and Tom had lunch at the park, and Anna gave the book to Tom."] * 5
    )
    prompt = f"{before.replace('Anna', 'Emma', 1)} {pair['prompt']}"
    desk.go("explain", prompt=prompt, contrast=f"{before} {pair['contrast']}")
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
    assert len(seen) > 1
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


def test_a_site_that_is_chosen_is_shown(desk: Desk) -> None:
    """From the selection's list one comes to what was read, not to the top of the page."""
    desk.go("look")
    desk.press("Look")
    desk.page.locator("uh1-grid td").nth(30).click()
    desk.page.locator(".wb-next button", has_text="Read").click()
    desk.page.locator(".wb-tool .uh-view").first.wait_for()
    desk.page.wait_for_function(
        "() => { const top = document.querySelector('.wb-tool').getBoundingClientRect().top;"
        " return top >= 0 && top < innerHeight / 2; }"
    )
    desk.page.keyboard.press("Escape")
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


def test_an_edge_is_dropped_in_sight_of_the_numbers(desk: Desk, pair: dict) -> None:
    """The numbers stay in sight while edges are dropped, and a link without its job asks anew."""
    desk.go("cause", tool="circuit", **pair)
    desk.press("Find the circuit")
    edges = desk.page.locator(".wb-lists section").nth(1)
    count = desk.page.locator(".wb-judged dd").nth(4)
    before = int(count.inner_text().split()[0])
    name = edges.locator("code").last.inner_text()
    edges.get_by_role("button", name=f"drop {name}", exact=True).click()
    desk.page.locator(".wb-chip", has_text=name).wait_for()
    desk.page.wait_for_function(
        "was => { const n = document.querySelectorAll('.wb-judged dd')[4];"
        " return document.querySelector('.wb-done') && parseInt(n.innerText) < was; }", arg=before,
    )  # fmt: skip
    assert count.is_visible()
    box = desk.page.locator(".wb-judged").bounding_box()
    assert box is not None and 0 <= box["y"] < 900, "in sight beside the list"
    after = count.inner_text()
    desk.go("cause", tool="circuit", drop=[name], **pair)
    desk.press("Find the circuit")
    desk.page.locator(".wb-chip", has_text=name).wait_for()
    assert count.inner_text() == after
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


@pytest.mark.parametrize(
    "name", ["circuit_overlap", "component_roles", "head_subspace", "prior_layers"]
)
def test_one_press_is_enough(desk: Desk, name: str) -> None:
    """A method that needs several rows, or a second set of them, starts with examples of these."""
    desk.go("methods", method=name)
    desk.press("Run")
    desk.page.locator(".wb-card .uh-view").first.wait_for()
    desk.quiet()


def test_a_second_set_of_pairs_is_what_was_typed(desk: Desk) -> None:
    desk.go("methods", method="circuit_overlap")
    other = desk.page.locator("fieldset", has_text="other")
    other.get_by_label("Contrasts").fill("")
    desk.page.get_by_role("button", name="Run", exact=True).click()
    desk.page.get_by_role("alert", name="").filter(has_text="half empty").wait_for()
    desk.quiet()


def test_a_plan_is_saved_loaded_and_given_to_a_method(desk: Desk) -> None:
    desk.go("change", tokens=4)
    desk.press("Write")
    desk.page.get_by_role("button", name="Save this plan").click()
    load = desk.page.get_by_label("Load a saved plan")
    load.locator("option", has_text="towards the contrast").first.wait_for(state="attached")
    load.select_option(index=1)
    texts = desk.page.locator(".wb-text")
    texts.nth(2).wait_for()  # written at once, as the other columns are
    desk.page.wait_for_function(
        "() => { const t = [...document.querySelectorAll('.wb-text')].map((e) => e.innerText);"
        " return t.length === 3 && t[1] && t[1] === t[2] && t[0] !== t[1]; }"
    )
    desk.go("methods", method="attention")
    desk.page.locator(".wb-card summary").first.click()
    desk.page.get_by_label("edits").select_option(index=1)
    desk.press("Run")
    desk.page.locator(".wb-card .uh-view").first.wait_for()
    desk.quiet()


LINKED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "explain": ("explain", {}, "Explain", ".wb-report"),
    "look": ("look", {}, "Look", "main .uh-title"),
    "site": ("look", {"site": "z.1.0"}, "Read", ".wb-tool .uh-title"),
    "patch": ("cause", {"tool": "patch"}, "Patch", "main .uh-title"),
    "circuit": ("cause", {"tool": "circuit", "target": 0.8}, "Find the circuit", ".wb-judged dd"),
    "change": ("change", {"tokens": 3}, "Write", ".wb-column"),
    "method": ("methods", {"method": "direct_attribution"}, "Run", ".wb-card .uh-title"),
}


@pytest.mark.parametrize("name", LINKED)
def test_a_link_shows_the_same(desk: Desk, name: str) -> None:
    """What a page shows after its work, a new tab shows from the address alone."""
    page, fields, button, where = LINKED[name]
    desk.go(page, **fields)
    desk.press(button)
    desk.page.locator(where).first.wait_for()
    shown = desk.page.locator(where).all_inner_texts()
    desk.page.wait_for_function("() => decodeURIComponent(location.hash).includes('\"id\"')")
    other = desk.page.context.new_page()
    other.goto(desk.page.url)
    other.wait_for_function(
        "([where, shown]) => JSON.stringify([...document.querySelectorAll(where)]"
        ".map((e) => e.innerText)) === JSON.stringify(shown)",
        arg=[where, shown],
    )
    other.evaluate(AXE.read_text(encoding="utf-8"))
    assert other.evaluate(_SERIOUS, None) == [], "nobody is barred from what was found"
    other.close()
    desk.quiet()


def test_another_model_starts_with_empty_pages(open_desk: Callable[..., Desk]) -> None:
    """What one model said must not stand under the name of another; a step back brings it again."""
    tab = open_desk()
    tab.go("look")
    tab.press("Look")
    panels = tab.page.locator("main .uh-title")
    panels.first.wait_for()
    tab.page.locator(".wb-side select").select_option("wired/induction")
    tab.page.locator(".wb-form").first.wait_for()
    tab.page.wait_for_function("() => !document.querySelector('main .uh-title')")
    tab.page.go_back()
    panels.first.wait_for()
    assert tab.page.locator(".wb-side select").input_value() == "village"
    tab.quiet()
    tab.page.context.close()


def test_a_link_to_a_model_of_another_server(desk: Desk) -> None:
    said = {"page": "look", "model": "nonesuch", "with": {}}
    desk.page.goto("about:blank")
    desk.page.goto(f"{desk.base}#{quote(json.dumps(said))}")
    alert = desk.page.get_by_role("alert")
    alert.wait_for()
    assert "nonesuch" in alert.inner_text() and "village" in alert.inner_text()
    desk.page.locator(".wb-form").first.wait_for()
    desk.quiet()


def test_a_job_waits_its_turn_and_says_so(open_desk: Callable[..., Desk]) -> None:
    """One tab works long, another waits in line; cancelling the first lets the second run."""
    first, second = open_desk(), open_desk()
    first.go("methods", method="masks", options={"steps": "100000"})
    first.page.get_by_role("button", name="Run", exact=True).click()
    first.page.locator(".wb-running", has_text="forward passes").wait_for()
    second.go("look")
    second.page.get_by_role("button", name="Look", exact=True).click()
    second.page.locator(".wb-queued", has_text="1 job before it").wait_for()
    first.page.get_by_role("button", name="Cancel").click()
    first.page.locator(".wb-cancelled").wait_for()
    second.page.locator(".wb-done").first.wait_for()
    for tab in (first, second):
        tab.quiet()
        tab.page.context.close()


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


def test_a_server_goes_and_another_comes(open_desk: Callable[..., Desk], tmp_path: Path) -> None:
    """The page says that it is gone; what was kept is found by the link, on the next server."""
    with served(tmp_path) as first:
        tab = open_desk(first)
        tab.go("methods", method="direct_attribution")
        tab.press("Run")
        tab.page.locator(".wb-card .uh-view").first.wait_for()
        tab.page.wait_for_function(
            '() => decodeURIComponent(location.hash).includes(\'"result":"\')'
        )
        link = tab.page.url.partition("#")[2]
        tab.go("methods", method="masks", options={"steps": "100000"})
        tab.page.get_by_role("button", name="Run", exact=True).click()
        tab.page.locator(".wb-running", has_text="forward passes").wait_for()
    # `served` has seen that a page which follows a job does not keep the server from ending.
    tab.page.get_by_text("the server does not answer; trying again").wait_for()
    tab.page.goto("about:blank")
    tab.page.context.close()
    with served(tmp_path) as second:
        tab = open_desk(second)
        tab.page.goto("about:blank")
        tab.page.goto(f"{tab.base}#{link}")
        tab.page.get_by_role("button", name="Open what was found").click()
        tab.page.locator(".wb-report .uh-view").first.wait_for()
        tab.quiet()
        tab.page.context.close()


def test_a_model_that_cannot_be_loaded(open_desk: Callable[..., Desk], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt2"', encoding="utf-8")
    with served(tmp_path / "results", str(broken)) as address:
        tab = open_desk(address)
        tab.page.locator("main h1", has_text="could not be loaded").wait_for()
        assert "config.json" in tab.page.get_by_role("alert").inner_text()
        tab.page.locator(".wb-side select").select_option("village")
        tab.page.locator(".wb-form").first.wait_for()
        assert tab.page.get_by_role("alert").count() == 0
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
        said = tab.page.get_by_text("This model reads no text")
        if page in ("explain", "look", "cause", "change"):
            said.wait_for()
    tab.page.get_by_text("ResNetForImageClassification").first.wait_for()
    tab.go("explain", prompt=[1, {"not": "text"}], contrast=5, job={"a": 1})
    tab.page.locator("main h1").wait_for()
    tab.quiet()
    tab.page.context.close()
