"""The page in a real browser, from disk, with JavaScript off."""

from pathlib import Path

from browser_kit import CUT_OFF, NEEDS_CHROMIUM, OVER, WIDTHS, browser

pytestmark = NEEDS_CHROMIUM


def test_page_reads_without_javascript(tmp_path: Path, sample_page: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(sample_page, encoding="utf-8")
    with browser() as open_tab:
        for scheme in ("light", "dark"):
            tab = open_tab(java_script_enabled=False, color_scheme=scheme)
            for width in WIDTHS:
                tab.page.set_viewport_size({"width": width, "height": 900})
                tab.page.goto(path.as_uri())
                # Evaluating is the debugger's right also where the page may run no script.
                assert tab.page.evaluate(OVER) <= 0, f"the body scrolls sideways at {width} px"
                assert tab.page.evaluate(CUT_OFF) == [], f"cut off at {width} px"
            assert tab.page.get_by_role("heading", level=1).count() == 1
            assert tab.page.get_by_role("navigation").get_by_role("link").count() == 7
            fold = tab.page.locator("details.uh-folded")
            assert not fold.get_by_text("Layer 2 has one neuron").is_visible()
            fold.locator("summary").first.click()
            assert fold.get_by_text("Layer 2 has one neuron").is_visible()
            tab.quiet()
            tab.page.context.close()
