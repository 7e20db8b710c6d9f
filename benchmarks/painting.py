"""Drawing in a browser: large grids, many edges, and a report of 12 x 12 attention heads.

Needs the dev extra and a Chromium (`chromium` on the path, or UNDERHOOD_CHROMIUM).
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import common
from underhood.view import View, graph, grid, heads
from underhood.view.html import style
from underhood.view.page import Section, page
from underhood.view.upgrade import script

TITLE = "Drawing in a browser"
ABOUT = (
    "Headless Chromium, drawing in software. A view: from its document to the second frame after,"
    " when it is on the screen. The report: from the address to the second frame after loading,"
    " from disk, with all its views drawn by the elements."
)
CHROMIUM = os.environ.get("UNDERHOOD_CHROMIUM") or shutil.which("chromium")

_FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
_DRAW = f"""
async (view) => {{
  const made = underhood1.element(view);
  if (view.kind === 'graph') made.most = Infinity;
  document.body.replaceChildren();
  await {_FRAMES};
  const start = performance.now();
  document.body.append(made);
  await made.updateComplete;
  await {_FRAMES};
  return performance.now() - start;
}}
"""


def cells(rows: int, cols: int) -> View:
    """A grid of noise."""
    values = np.random.default_rng(0).normal(0, 1, (rows, cols))
    return grid(values, rows=range(rows), cols=range(cols), row_name="layer", col_name="token")


def edges(count: int) -> View:
    """A graph of noise, whose picture shows every edge."""
    rng = np.random.default_rng(0)
    nodes = [{"id": f"a{y}.h{x}", "y": y, "x": x} for y in range(24) for x in range(16)]
    ends = np.sort(rng.integers(0, len(nodes), (count, 2)), axis=1)
    weights = rng.normal(0, 1, count)
    return graph(
        nodes,
        [(nodes[a]["id"], nodes[b]["id"], w) for (a, b), w in zip(ends, weights, strict=True)],
    )


def report(side: int, tokens: int) -> str:
    """A page with side x side attention patterns over some tokens."""
    rng = np.random.default_rng(0)
    scores = np.exp(rng.normal(0, 1, (side, side, tokens, tokens)))
    scores = np.tril(scores)
    scores /= scores.sum(-1, keepdims=True)
    patterns = {f"{i}.{j}": scores[i, j].round(4) for i in range(side) for j in range(side)}
    view = heads([f" t{i}" for i in range(tokens)], patterns, title="All heads")
    return page("All heads", [Section(id="heads", title="Heads", views=[view])])


def drawn(tab: Any, view: View, what: str, bar: float, runs: int) -> common.Row:
    """How long one view takes; of a graph, all edges are drawn."""
    document = view.to_dict()
    tab.goto("about:blank")
    tab.set_content(f"<style>{style()}</style><body class=uh></body>")
    tab.add_script_tag(content=script())
    tab.evaluate(_DRAW, document)
    seconds = median(tab.evaluate(_DRAW, document) / 1000 for _ in range(runs))
    return common.Row("one view", what, seconds, "s", seconds, None, bar, runs)


def opened(tab: Any, text: str, what: str, bar: float, runs: int) -> common.Row:
    """How long a page takes from disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(text, encoding="utf-8")

        def go() -> float:
            tab.goto("about:blank")
            tab.goto(path.as_uri())
            return tab.evaluate(f"{_FRAMES}.then(() => performance.now())") / 1000

        go()
        seconds = median(go() for _ in range(runs))
    return common.Row("a report", what, seconds, "s", seconds, None, bar, runs)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write `results/painting.json`."""
    from playwright.sync_api import sync_playwright

    chosen, load = common.options(__doc__, argv), common.load_average()
    found = common.Report("painting", TITLE, ABOUT)
    runs = chosen.runs or (1 if chosen.quick else 9)
    rows, count, side, tokens = (8, 400, 2, 8) if chosen.quick else (200, 40_000, 12, 32)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        cols = 100 if chosen.quick else 400
        size, paths = f"{rows * cols:,} cells", f"{count:,} edges"
        for row in (
            drawn(tab, cells(rows, cols), size, 0.1, runs),
            drawn(tab, edges(count), paths, 0.5, runs),
            opened(tab, report(side, tokens), f"{side} x {side} heads", 1.0, runs),
        ):
            found.rows.append(row)
            common.show(row)
        browser.close()
    return common.write(found, chosen, load)


if __name__ == "__main__":
    main()
