"""Make the pictures of the docs from the real thing: `python scripts/picture.py`.

The report is that of `make explain`; the workbench is served, and used as a person would.
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
        report(tab, Path(name))
        with served(Path(name)) as address:
            workbench(tab, address)
        browser.close()


if __name__ == "__main__":
    main()
