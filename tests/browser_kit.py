"""What the browser tests share: one Chromium per module, and everything it did wrong."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from underhood.view import View
from underhood.view.html import style
from underhood.view.upgrade import script

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
WIDTHS = (390, 1280, 2560)
OURS = ("file:", "data:", "blob:", "about:")

NEEDS_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("UNDERHOOD_REQUIRE_BROWSER") != "1",
        reason="chromium is not installed",
    ),
]

OVER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
"""How far the page can be scrolled sideways."""

CUT_OFF = """
() => [...document.querySelectorAll('.uh-view, figure, h1, h2, h3, p, table, button')]
.filter((e) => {
  const box = e.getBoundingClientRect();
  const held = e.closest('.uh-scroll, .uh-hidden, .uh-strip, .uh-tree, details:not([open])');
  return !held && box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map((e) => e.tagName + '.' + e.className)
"""

# The same things told of a static drawing and of an element: words, colours, shapes, pixels.
_TELL = """
(root) => {
  const skip = '.uh-tools, .uh-readout, .uh-slider, .uh-find, .uh-pins, .uh-made, script,'
    + ' .uh-sort > [aria-hidden]';
  const seen = (e) => !e.closest(skip);
  const squeeze = (t) => t.replace(/\\s+/g, '');
  const number = (t) => (t !== '' && !isNaN(Number(t)) ? String(Number(t)) : t);
  const all = (css) => [...root.querySelectorAll(css)].filter(seen);
  const pixels = (e) => {
    const canvas = document.createElement('canvas');
    canvas.width = e.naturalWidth ?? e.width;
    canvas.height = e.naturalHeight ?? e.height;
    const pen = canvas.getContext('2d');
    pen.drawImage(e, 0, 0);
    const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
    let hash = 0;
    for (let i = 0; i < data.length; i += 4) {
      // A transparent pixel has no colour.
      const value = data[i + 3] ? (data[i] << 16) | (data[i + 1] << 8) | data[i + 2] : -1;
      hash = (hash * 31 + value) | 0;
    }
    return [canvas.width, canvas.height, hash].join(' ');
  };
  const rounded = (t) => (t ?? '').replace(/-?\\d+\\.\\d+/g, (x) => Number(x).toFixed(1));
  return {
    words: all('p, td, th, li, dt, dd, caption, figcaption, .uh-chip, .uh-node, code, '
      + '.uh-xticks > span, .uh-yticks > span, .uh-across > span, .uh-down > span, .uh-onset')
      .map((e) => number(squeeze(e.textContent))),
    titles: all('td[title], .uh-chip[title], tr[title], .uh-word[title], .uh-node[title]')
      .map((e) => e.title),
    colours: all('td, .uh-chip, .uh-word, .uh-node').map((e) => {
      const s = getComputedStyle(e);
      return [s.backgroundColor, s.color, s.backgroundImage.slice(0, 60)].join(' ');
    }),
    places: all('.uh-bar, .uh-band, .uh-axis, .uh-spot, .uh-node').map((e) => rounded(
      [e.className, e.style.left, e.style.width, e.style.top].join(' '))),
    shapes: all('svg:not(.uh-own) path, svg rect').map((e) => rounded(
      [e.getAttribute('d'), e.getAttribute('class'), e.getAttribute('height')].join(' '))),
    pixels: all('img.uh-img, canvas.uh-img, img.uh-over, canvas.uh-over').map(pixels),
  };
}
"""


class Tab:
    """One page of the browser, and all that it complained of or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.told: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda m: self.told.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.told.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def draw(self, *views: View, **options: Any) -> Any:
        """A bare page with the elements of these views; returns a locator of the first."""
        self.page.goto("about:blank")
        self.page.set_content(f"<style>{style()}</style><body class=uh></body>")
        self.page.add_script_tag(content=script())
        self.page.evaluate(
            "([docs, options]) => document.body.append("
            "...docs.map((d) => underhood1.element(d, options)))",
            [[view.to_dict() for view in views], options],
        )
        return self.page.locator("body > .uh-view").first

    def both(self, view: View) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """What the static drawing tells, and what the element tells."""
        self.draw(view)
        static = self.page.evaluate(
            "(html) => { const box = document.createElement('div'); box.innerHTML = html;"
            " document.body.append(box); return Promise.all([...box.querySelectorAll('img')]"
            f".map((i) => i.decode())).then(() => ({_TELL})(box)); }}",
            view.html().split("</style>")[1],
        )
        live = self.page.evaluate(
            "() => customElements.whenDefined('uh1-grid').then(() => "
            f"({_TELL})(document.querySelector('body > .uh-view')))"
        )
        return static, live

    def quiet(self) -> None:
        """Nothing went wrong, and nothing was asked of anyone else."""
        assert self.told == []
        assert [url for url in self.asked if not url.startswith(OURS)] == []


@contextmanager
def browser() -> Iterator[Callable[..., Tab]]:
    """A running Chromium; what it yields opens tabs (options as of `new_context`)."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def tab(**options: Any) -> Tab:
            return Tab(running.new_context(**options).new_page())

        yield tab
        running.close()


def saved(tab: Tab, view: Any, name: str) -> bytes:
    """What the button `name` of a view's menu saves."""
    view.locator("> .uh-tools summary").click()
    with tab.page.expect_download() as waiting:
        view.locator("> .uh-tools .uh-menu").get_by_role("button", name=name).click()
    return Path(waiting.value.path()).read_bytes()
