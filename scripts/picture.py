"""Make the pictures of the docs from the real thing: `python scripts/picture.py`.

The report is that of `make explain`; the workbench is served, and used as a person would. With a
folder, `python scripts/picture.py FOLDER` takes every page of the workbench into it instead: empty,
filled and with an error, in light and dark and at three widths, to be looked at.
Needs the dev extra and a Chromium (`chromium` on the path, or UNDERHOOD_CHROMIUM).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent.parent / "docs"
SIZE = {"width": 1100, "height": 1500}
PROMPT = "When Mary and John went to the store, John gave a drink to"
CONTRAST = "When Mary and John went to the store, Mary gave a drink to"
# Pages of the workbench: what their address says, and the button to press.
PAGES = {
    "cause": ({"tool": "circuit", "prompt": PROMPT, "contrast": CONTRAST}, "Find the circuit"),
    "change": ({}, "Write"),
}
# The same for looking at: what else is pressed, and what goes wrong there.
SHORT = {"prompt": PROMPT, "contrast": "Mary went"}
NOWHERE = {"site": "z.99.0", "op": "zero", "fields": {}, "strength": 1, "unit": "raw"}
STATES = {
    "explain": ({}, "Explain", SHORT),
    "look": ({}, "Look", {"prompt": "Mary " * 2000}),
    "cause": ({"tool": "patch"}, "Patch", SHORT | {"tool": "patch"}),
    "cause attribute": ({"tool": "attribute"}, "Attribute", SHORT | {"tool": "attribute"}),
    "cause circuit": ({"tool": "circuit"}, "Find the circuit", SHORT | {"tool": "circuit"}),
    "change": ({}, "Write", {"prompt": PROMPT, "columns": [{"label": "a", "edits": [NOWHERE]}]}),
    "methods": ({"method": "circuit_overlap"}, "Run", {"data": {"contrasts": "Mary went"}}),
    "results": ({}, None, {"open": "nothing"}),
    "model": ({}, None, None),
}
LOOKS = [(1280, "light"), (1280, "dark"), (390, "light"), (2560, "light")]


def report(tab: Any, folder: Path) -> None:
    """The first screen of the report."""
    page = folder / "report.html"
    command = [sys.executable, "-m", "underhood.cli", "explain", PROMPT, "--vs", CONTRAST]
    subprocess.run([*command, "-o", str(page)], check=True, stdout=subprocess.DEVNULL)
    tab.goto(page.as_uri())
    tab.wait_for_timeout(1000)
    tab.screenshot(path=DOCS / "report.png")


def workbench(tab: Any, address: str) -> None:
    """Each page, after its example has run."""
    tab.goto(address)
    tab.locator("main h1").wait_for()
    base = address.partition("?")[0]
    for name, (said, press) in PAGES.items():
        tab.goto("about:blank")
        tab.goto(f"{base}#{quote(json.dumps({'page': name, 'model': 'town', 'with': said}))}")
        tab.get_by_role("button", name=press, exact=True).click()
        tab.locator(".wb-done").first.wait_for()
        tab.wait_for_timeout(500)
        tab.screenshot(path=DOCS / f"workbench-{name}.png")


def tour(tab: Any, address: str, folder: Path) -> None:
    """Every page in every state, at every size."""
    tab.goto(address)
    tab.locator(".wb-form").wait_for()
    base = address.partition("?")[0]

    def take(name: str) -> None:
        tab.wait_for_timeout(700)
        for width, scheme in LOOKS:
            tab.set_viewport_size({"width": width, "height": 900})
            tab.emulate_media(color_scheme=scheme)
            tab.wait_for_timeout(200)
            path = folder / f"{name.replace(' ', '-')}-{width}-{scheme}.png"
            tab.screenshot(path=path, full_page=True)

    def go(page: str, said: dict[str, Any], press: str | None, wait: str) -> None:
        tab.goto("about:blank")
        tab.goto(f"{base}#{quote(json.dumps({'page': page, 'model': 'town', 'with': said}))}")
        if press:
            tab.get_by_role("button", name=press, exact=True).click()
        tab.locator(wait).first.wait_for()

    for name, (said, press, wrong) in STATES.items():
        page = name.partition(" ")[0]
        go(page, said, None, "main h1")
        take(f"{name}-empty")
        if press:
            go(page, said, press, ".wb-done")
            take(f"{name}-filled")
        if wrong:
            go(page, wrong, press, ".wb-problem")
            take(f"{name}-error")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a workbench with the built-in model."""
    words = ["serve", "--no-open", "--port", "0", "--results", str(folder), "--quiet"]
    server = subprocess.Popen(
        [sys.executable, "-m", "underhood.cli", *words], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """All pictures."""
    path = os.environ.get("UNDERHOOD_CHROMIUM") or shutil.which("chromium")
    with TemporaryDirectory() as name, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport=SIZE)
        looked_at = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        if looked_at is None:
            report(tab, Path(name))
        with served(Path(name)) as address:
            if looked_at is None:
                workbench(tab, address)
            else:
                tour(tab, address, looked_at)
        browser.close()


if __name__ == "__main__":
    main()
