"""Start-up: whole processes, from the shell to the answer."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import common

TITLE = "Start-up, from the shell"
ABOUT = (
    "Whole processes, files already in the system's cache. `import underhood` is what it costs over"
    " `import torch, transformers` (the two run in turn; difference of each pair)."
)
PEERS = "import torch, transformers"
PROMPT = "When Mary and John went to the store, John gave a drink to"
CONTRAST = "When Mary and John went to the store, Mary gave a drink to"
CLI = [sys.executable, "-m", "underhood.cli"]


def process(command: list[str]) -> float:
    """Seconds of one process.

    Raises:
        RuntimeError: It failed.
    """

    def go() -> Any:
        return subprocess.run(command, capture_output=True, text=True)

    done: list[Any] = []
    seconds = common.timed(lambda: done.append(go()))
    if done[0].returncode:
        last = (done[0].stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"exit code {done[0].returncode}: {last}"[:200])
    return seconds


def alone(command: list[str], runs: int, *, what: str, bar: float) -> common.Row:
    """A process by itself."""
    process(command)  # fills the file cache
    seconds = median(process(command) for _ in range(runs))
    return common.Row("shell", what, seconds, "s", seconds, None, bar, runs)


def added(statement: str, runs: int, *, what: str, bar: float | None) -> common.Row:
    """What a statement costs over the import of torch and transformers."""
    base = [sys.executable, "-c", PEERS]
    more = [sys.executable, "-c", f"{PEERS}; {statement}"]
    process(base), process(more)
    times = [(process(base), process(more)) for _ in range(runs)]
    extra = median(m - b for b, m in times)
    own, plain = median(m for _, m in times), median(b for b, _ in times)
    return common.Row("python", what, extra, "s", own, plain, bar, runs)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write `results/imports.json`."""
    chosen, load = common.options(__doc__, argv), common.load_average()
    report = common.Report("imports", TITLE, ABOUT)
    runs = chosen.runs or (1 if chosen.quick else 5)

    def measure(name: str, row: Any) -> None:
        try:
            report.rows.append(found := row())
            common.show(found)
        except RuntimeError as error:
            report.missing[name] = str(error)

    helped = "underhood --help"
    measure(helped, lambda: alone([*CLI, "--help"], runs, what=helped, bar=0.4))
    imported = "import underhood"
    measure(imported, lambda: added(imported, runs, what=imported, bar=0.3))
    if not chosen.quick:
        used = "import underhood; its Model, load and Edit"
        names = "import underhood as uh; uh.Model, uh.load, uh.Edit"
        measure(used, lambda: added(names, runs, what=used, bar=None))
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "report.html")
            command = [*CLI, "explain", PROMPT, "--vs", CONTRAST, "-o", out]
            told = "underhood explain, to the report"
            measure(told, lambda: alone(command, runs, what=told, bar=15.0))
    return common.write(report, chosen, load)


if __name__ == "__main__":
    main(sys.argv[1:])
