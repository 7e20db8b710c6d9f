"""What every benchmark shares: fair pairs, the record of the machine, the JSON file.

A number is a ratio of two things run in turn in one process, again and again, so that whatever
else the machine does hits both; the median of the ratios is reported. Each benchmark writes one
JSON file (`results/NAME.json`, schema `benchmark/1`); `report.py` makes docs/benchmarks.md of them.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

SCHEMA = "benchmark/1"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("underhood", "torch", "transformers", "transformer-lens", "nnsight")


@dataclass(slots=True)
class Row:
    """One measured thing.

    Attributes:
        case: The setting, e.g. "16 tokens".
        what: What was run.
        value: The number that counts, in `unit`.
        unit: "x" (times the base) or "s".
        seconds: Median time of the thing itself; None where memory was measured.
        base_seconds: Median time of what it is compared with; None where it stands alone.
        bar: The most that `value` may be; None where nothing was promised.
        runs: How often.
        bytes: Most memory held at once, where that was measured.
        base_bytes: The same of what it is compared with.
    """

    case: str
    what: str
    value: float
    unit: str
    seconds: float | None
    base_seconds: float | None = None
    bar: float | None = None
    runs: int = 1
    bytes: int | None = None
    base_bytes: int | None = None


@dataclass(slots=True)
class Table:
    """Numbers that are not times.

    Attributes:
        title: One line.
        columns: Names of the columns.
        rows: Text, numbers (shown with two decimals), or None.
    """

    title: str
    columns: list[str]
    rows: list[list[str | float | None]]


@dataclass(slots=True)
class Report:
    """What a benchmark found.

    Attributes:
        name: Name of the script and of the file.
        title: One line.
        about: What was run against what.
        rows: The numbers.
        missing: What could not be measured, and why.
        tables: Numbers that are not times.
    """

    name: str
    title: str
    about: str
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)


def options(about: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options; sets the number of threads."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few runs: a test")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--runs", type=int, help="how many pairs of runs per number")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/NAME.json)")
    chosen = parser.parse_args(argv)
    if chosen.threads:
        import torch

        torch.set_num_threads(chosen.threads)
    return chosen


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call; the garbage of earlier calls is not on its bill."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        kept = function()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    del kept
    return seconds


def pairs(base: Callable[[], Any], other: Callable[[], Any], runs: int) -> tuple[float, ...]:
    """Run both in turn, each first every other time.

    Returns:
        The median ratio other / base, and the medians of other and of base in seconds.
    """
    base(), other()
    times: list[tuple[float, float]] = []
    for number in range(runs):
        if number % 2:
            late = timed(other)
            times.append((timed(base), late))
        else:
            early = timed(base)
            times.append((early, timed(other)))
    ratio = median(o / b for b, o in times)
    return ratio, median(o for _, o in times), median(b for b, _ in times)


def against(
    base: Callable[[], Any], other: Callable[[], Any], runs: int, *, case: str, what: str,
    bar: float | None = None,
) -> Row:  # fmt: skip
    """A row that says how many times the base's time something takes."""
    ratio, seconds, base_seconds = pairs(base, other, runs)
    row = Row(case, what, ratio, "x", seconds, base_seconds, bar, runs)
    show(row)
    return row


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that torch's allocator held at once during a call, beyond what it held before.

    From the profiler's record of every allocation and release on the CPU, scratch space of torch's
    own kernels included; what a linear algebra library takes for itself is not seen. One call goes
    before, so that what is made once and kept is not counted.
    """
    from torch.profiler import ProfilerActivity, profile

    function()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = function()
    del kept
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def memory_against(
    base: Callable[[], Any], other: Callable[[], Any], *, case: str, what: str,
    bar: float | None = None,
) -> Row:  # fmt: skip
    """A row that says how many times the base's memory something takes."""
    held, base_held = peak_bytes(other), peak_bytes(base)
    row = Row(case, what, held / base_held, "x", None, bar=bar, bytes=held, base_bytes=base_held)
    show(row)
    return row


def show(row: Row) -> None:
    """One line on the terminal."""
    bar = "" if row.bar is None else f"   bar {row.bar:g} {row.unit}"
    print(f"{row.case:<14} {row.what:<44} {row.value:8.3f} {row.unit}{bar}", flush=True)


def gpt2(*, quick: bool) -> Any:
    """GPT-2 small with random weights (seed 0), or a tiny one; nothing is downloaded."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 48, "n_head": 4, "n_layer": 4, "vocab_size": 97, "n_positions": 256}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**((small | ends) if quick else {}))).eval()


def machine(load: float) -> dict[str, Any]:
    """Processor, cores, threads, versions, and how busy the machine was before we began."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "versions": versions,
    }


def load_average() -> float:
    """Running processes per core over the last minute (0 where the system does not say)."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 0.0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(report: Report, chosen: argparse.Namespace, load: float) -> dict[str, Any]:
    """Save the JSON file (with `--quick` only where `--out` says) and return its content."""
    threads = [f"--threads {chosen.threads}"] if chosen.threads else []
    runs = [f"--runs {chosen.runs}"] if chosen.runs else []
    quick = ["--quick"] if chosen.quick else []
    document = {
        "schema": SCHEMA,
        **asdict(report),
        "quick": chosen.quick,
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python benchmarks/{report.name}.py", *quick, *threads, *runs]),
        "machine": machine(load),
    }
    path = chosen.out or (None if chosen.quick else RESULTS / f"{report.name}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {path.name}")
    return document


def bridge(module: Any) -> Any:
    """TransformerLens 4 over a Hugging Face GPT-2; nothing is downloaded."""
    import tempfile

    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        return TransformerBridge.boot_transformers(
            "gpt2", hf_model=module, tokenizer=_tokenizer(folder), device="cpu"
        )


def _tokenizer(folder: str) -> Any:
    """The bridge wants a tokenizer that it can load again; ids are all that it is given."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = Tokenizer(models.WordLevel({end: 0, "a": 1}, unk_token=end))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=end, eos_token=end, pad_token=end, unk_token=end
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
