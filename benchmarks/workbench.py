"""The workbench as a person meets it: a server of its own process, a browser, a slider.

Needs the dev extra and a Chromium (`chromium` on the path, or UNDERHOOD_CHROMIUM).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import common

TITLE = "The workbench"
ABOUT = (
    "`underhood serve` with the built-in model, and headless Chromium on the same machine. First"
    " page: from its address to the frame that shows the filled-in example, with the model loaded."
    " A slider: from its movement to the frame that shows the first token of the new text. Explain:"
    " from the click to the first part, and to the last."
)
CHROMIUM = os.environ.get("UNDERHOOD_CHROMIUM") or shutil.which("chromium")
MODEL = "town"
READY = "() => document.querySelector('#wb-prompt')?.value"

# Seconds from ACT to the frame in which WANTED is there.
_TIMED = """
() => new Promise((done) => {
  const start = performance.now();
  ACT
  const look = () => {
    if (WANTED) requestAnimationFrame(() => done((performance.now() - start) / 1000));
    else requestAnimationFrame(look);
  };
  look();
})
"""
_SLIDE = """
const box = document.querySelector('.wb-strength input[type=range]');
box.value = String(STRENGTH);
box.dispatchEvent(new Event('input', {bubbles: true}));
"""
_TEXT = "document.querySelectorAll('.wb-text')[1]"
_EXPLAIN = "document.querySelector('.wb-run').click()"


def timed(tab: Any, act: str, wanted: str) -> float:
    """How long until `wanted` holds, after `act`; both are JavaScript."""
    return tab.evaluate(_TIMED.replace("ACT", act).replace("WANTED", wanted))


@contextmanager
def served(model: str, threads: int | None) -> Iterator[str]:
    """A server's address."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "underhood.cli",
            "serve",
            model,
            "--no-open",
            "--port",
            "0",
        ]
        server = subprocess.Popen(
            [*command, "--results", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        )  # fmt: skip
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            server.wait(20)


def first_page(browser: Any, url: str, runs: int) -> common.Row:
    """A new visitor each time."""

    def go() -> float:
        context = browser.new_context()
        tab = context.new_page()
        start = time.perf_counter()
        tab.goto(url)
        tab.wait_for_function(READY)
        seconds = time.perf_counter() - start
        context.close()
        return seconds

    go()
    seconds = median(go() for _ in range(runs))
    return common.Row(
        "a page", "first page, example filled in", seconds, "s", seconds, None, 1.0, runs
    )


def slider(tab: Any, base: str, runs: int) -> common.Row:
    """Every time another strength, so that nothing was written before."""
    tab.goto(f"{base}#%7B%22page%22:%22change%22%7D")
    tab.reload()
    tab.wait_for_selector(".wb-strength input[type=range]")
    tab.get_by_role("button", name="Write", exact=True).click()
    tab.wait_for_selector(".wb-done")
    found = []
    for i in range(runs + 1):
        act = f"const text = {_TEXT}, old = text.innerHTML;"
        act += _SLIDE.replace("STRENGTH", str(0.1 + 0.05 * i))
        found.append(timed(tab, act, f"{_TEXT}.innerHTML !== old"))
        tab.wait_for_selector(".wb-done")
    seconds = median(found[1:])
    what = "a slider moves, to the first new token"
    return common.Row("a page", what, seconds, "s", seconds, None, 0.3, runs)


def explained(tab: Any, base: str, runs: int) -> list[common.Row]:
    """From the click, to the first part and to the last."""
    first, last = [], []
    for _ in range(runs):
        tab.goto("about:blank")
        tab.goto(base)
        tab.wait_for_function(READY)
        start = time.perf_counter()
        first.append(timed(tab, _EXPLAIN, "document.querySelector('.wb-report .uh-section')"))
        tab.wait_for_selector(".wb-done")
        last.append(time.perf_counter() - start)
    rows = (("Explain, to the first part", median(first)), ("Explain, all parts", median(last)))
    return [common.Row("a page", what, s, "s", s, None, None, runs) for what, s in rows]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write `results/workbench.json`."""
    from playwright.sync_api import sync_playwright

    chosen, load = common.options(__doc__, argv), common.load_average()
    report = common.Report("workbench", TITLE, ABOUT)
    runs = chosen.runs or (1 if chosen.quick else 9)
    model = "village" if chosen.quick else MODEL
    with served(model, chosen.threads) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)  # a busy machine shall be measured, not refused
        tab.goto(url)
        tab.wait_for_function(READY)
        base = url.partition("?")[0]
        rows = [first_page(browser, url, runs), slider(tab, base, runs)]
        for row in [*rows, *explained(tab, base, 1 if chosen.quick else 3)]:
            report.rows.append(row)
            common.show(row)
        browser.close()
    return common.write(report, chosen, load)


if __name__ == "__main__":
    main()
