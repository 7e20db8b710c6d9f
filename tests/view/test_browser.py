"""The page in a real browser, from disk, with JavaScript off."""

import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (390, 1280, 2560)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("UNDERHOOD_REQUIRE_BROWSER") != "1",
        reason="chromium is not installed",
    ),
]

_ESCAPES = """
() => [...document.querySelectorAll('.uh-view, figure, h1, h2, h3, p, table')].filter(e => {
  const box = e.getBoundingClientRect();
  const held = e.closest('.uh-scroll, .uh-hidden, details:not([open])');
  return !held && box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.tagName + '.' + e.className)
"""


def test_page_reads_without_javascript(tmp_path: Path, sample_page: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "report.html"
    path.write_text(sample_page, encoding="utf-8")
    told: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            context = browser.new_context(java_script_enabled=False, color_scheme=scheme)
            tab = context.new_page()
            tab.on("console", lambda message: told.append(message.text))
            tab.on("pageerror", lambda error: told.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            for width in WIDTHS:
                tab.set_viewport_size({"width": width, "height": 900})
                tab.goto(path.as_uri())
                # Evaluating is the debugger's right also where the page may run no script.
                over = tab.evaluate(
                    "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert over <= 0, f"the body scrolls sideways at {width} px"
                assert tab.evaluate(_ESCAPES) == [], f"cut off at {width} px"
            assert tab.get_by_role("heading", level=1).count() == 1
            assert tab.get_by_role("navigation").get_by_role("link").count() == 7
            fold = tab.locator("details.uh-folded")
            assert not fold.get_by_text("Layer 2 has one neuron").is_visible()
            fold.locator("summary").first.click()
            assert fold.get_by_text("Layer 2 has one neuron").is_visible()
            context.close()
        browser.close()
    assert told == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
