"""The page with its script: alive, closed to the outside, the same story, usable by everyone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from browser_kit import AXE, CUT_OFF, NEEDS_CHROMIUM, OVER, WIDTHS, Tab, browser
from underhood.view import View, group
from underhood.view.html import fragment
from underhood.view.page import Section, page

pytestmark = NEEDS_CHROMIUM

_OPEN_ALL = """
async () => {
  for (let round = 0; round < 4; round += 1) {
    for (const fold of document.querySelectorAll('details:not([open])'))
      if (!fold.matches('.uh-menu')) fold.open = true;
    await new Promise((done) => setTimeout(done, 60));
  }
}
"""


@pytest.fixture(scope="module")
def open_tab() -> Iterator[Callable[..., Tab]]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, View]) -> Path:
    """A page with every kind of view, half of it folded."""
    names = list(samples)
    half = len(names) // 2
    sections = [
        Section(id="open", number=1, title="In sight", question="What is open?",
                answer="The first half.", views=[samples[name] for name in names[:half]]),
        Section(id="folded", number=2, title="Folded", question="What is not?",
                answer="The other half.", views=[samples[name] for name in names[half:]],
                folded=True),
    ]  # fmt: skip
    made = {"model": "gpt2", "seed": 0}
    text = page("Everything", sections, lead="All kinds.", provenance=made, python="uh.explain()")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_view_comes_alive_everywhere(open_tab: Callable[..., Tab], report: Path) -> None:
    for scheme in ("light", "dark"):
        tab = open_tab(color_scheme=scheme)
        for width in WIDTHS:
            tab.page.set_viewport_size({"width": width, "height": 900})
            tab.page.goto(report.as_uri())
            assert tab.page.locator("#folded .uh-doc").count() > 0, "folded ones wait"
            tab.page.evaluate(_OPEN_ALL)
            assert tab.page.locator(".uh-doc").count() == 0
            assert tab.page.evaluate(OVER) <= 0, f"the body scrolls sideways at {width} px"
            assert tab.page.evaluate(CUT_OFF) == [], f"cut off at {width} px"
        tab.quiet()
        tab.page.context.close()


def test_policy_stops_requests(open_tab: Callable[..., Tab], report: Path) -> None:
    tab = open_tab()
    tab.page.goto(report.as_uri())
    blocked = tab.page.evaluate(
        """() => new Promise((done) => {
          addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));
          const script = document.createElement('script');
          script.textContent = 'globalThis.ran = true';
          document.body.append(script);
        }).then(async (directive) => [
          directive, globalThis.ran === undefined,
          await fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped'),
        ])"""
    )
    assert blocked == ["script-src-elem", True, "stopped"]
    assert [url for url in tab.asked if not url.startswith("file:")] == []


def test_a_link_opens_what_is_folded(open_tab: Callable[..., Tab], report: Path) -> None:
    for scripts in (True, False):
        tab = open_tab(java_script_enabled=scripts)
        tab.page.goto(report.as_uri())
        assert not tab.page.locator("#folded").is_visible()
        tab.page.get_by_role("navigation").get_by_role("link", name="Folded").click()
        tab.page.locator("#folded").wait_for(state="visible")
        tab.page.goto(report.as_uri() + "#folded")
        tab.page.locator("#folded").wait_for(state="visible")


def test_print_shows_what_is_folded(open_tab: Callable[..., Tab], report: Path) -> None:
    tab = open_tab()
    tab.page.goto(report.as_uri())
    tab.page.emulate_media(media="print")
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    body = tab.page.locator("#folded")
    assert body.bounding_box() is not None
    assert body.locator(".uh-view").first.is_visible()
    assert not tab.page.locator(".uh-tools").first.is_visible()
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )


def test_folded_group_prints(
    open_tab: Callable[..., Tab], tmp_path: Path, samples: dict[str, View]
) -> None:
    inner = samples["tokens"]
    path = tmp_path / "x.html"
    view = group([inner], folded=True, title="More")
    path.write_text(page("t", [Section(id="a", title="A", views=[view])]), encoding="utf-8")
    tab = open_tab()
    tab.page.goto(path.as_uri())
    assert tab.page.locator(".uh-chip").count() == 0
    tab.page.emulate_media(media="print")
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.page.locator(".uh-chip").first.wait_for(state="visible")


def test_no_serious_barrier(open_tab: Callable[..., Tab], report: Path) -> None:
    # In the dark only the colours differ.
    for scheme, rules in (("light", None), ("dark", ["color-contrast"])):
        tab = open_tab(color_scheme=scheme)
        tab.page.goto(report.as_uri())
        tab.page.evaluate(_OPEN_ALL)
        tab.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = tab.page.evaluate(
            "(rules) => axe.run(document, {resultTypes: ['violations'],"
            " ...(rules && {runOnly: rules})}).then((r) => r.violations"
            ".filter((v) => ['serious', 'critical'].includes(v.impact))"
            ".map((v) => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200),"
            " v.nodes[0].failureSummary.slice(0, 300)]))",
            rules,
        )
        assert found == [], scheme
        tab.page.context.close()


def test_the_call_can_be_copied(
    open_tab: Callable[..., Tab], report: Path, samples: dict[str, View]
) -> None:
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    tab.page.goto(report.as_uri())
    tab.page.get_by_role("button", name="copy Python").first.click()
    tab.page.get_by_role("button", name="copied").wait_for()
    assert tab.page.evaluate("navigator.clipboard.readText()") == samples["grid"].python


def test_two_cells_share_one_definition(
    open_tab: Callable[..., Tab], samples: dict[str, View]
) -> None:
    tab = open_tab()
    cells = [fragment(samples[name], live=True) for name in ("tokens", "grid")]
    tab.page.set_content("<body>" + "<hr>".join(cells))
    for kind in ("tokens", "grid"):
        tab.page.locator(f"uh1-{kind} .uh-legend").first.wait_for()
    assert tab.page.locator(".uh-doc").count() == 0
    assert tab.page.evaluate("document.adoptedStyleSheets.length") == 1
    tab.quiet()


def test_broken_documents_leave_the_drawing(
    open_tab: Callable[..., Tab], samples: dict[str, View]
) -> None:
    tab = open_tab()
    good = fragment(samples["tokens"], live=True)
    for broken in (
        good.replace('"tokens": [', '"tokens": ', 1),  # cut short
        good.replace('"kind": "tokens"', '"kind": "hologram"', 1),  # of a newer version
    ):
        assert broken != good
        tab.page.set_content(broken)
        tab.page.wait_for_function("globalThis.underhood1 !== undefined")
        assert tab.page.locator("section.uh-tokens .uh-chip").count() == 15
    tab.quiet()
