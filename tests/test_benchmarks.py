"""The benchmarks run and write what the page is made of; times are nobody's business here."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROW = {"case", "what", "value", "unit", "seconds", "base_seconds", "bar", "runs"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A benchmark as a module; the number of threads is put back."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))

    def take(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield take
    torch.set_num_threads(threads)


def check_form(document: dict[str, Any], path: Path, name: str) -> None:
    assert json.loads(path.read_text()) == document
    assert document["schema"] == "benchmark/1" and document["name"] == name
    assert document["quick"] and document["command"].startswith(f"python benchmarks/{name}.py")
    assert {"processor", "cores", "system", "threads", "load_before", "versions"} == set(
        document["machine"]
    )
    assert document["rows"]
    for row in document["rows"]:
        assert set(row) == ROW and row["unit"] in ("x", "s") and row["runs"] >= 1
        assert row["seconds"] > 0 and isinstance(row["value"], float)


def test_recording(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    document = script("recording").main(["--quick", "--threads", "1", "--out", str(path)])
    check_form(document, path, "recording")
    ours = [r["what"] for r in document["rows"] if r["what"].startswith("underhood")]
    assert ours == [
        f"underhood: {what}"
        for what in ("nothing", "all residuals", "everything of one layer", "everything")
    ]
    assert [r["bar"] for r in document["rows"][:4]] == [None, 1.03, 1.15, None]
    assert document["machine"]["threads"] == 1
    # A peer has rows or a reason.
    for peer in ("TransformerLens", "nnsight"):
        measured = any(r["what"].startswith(peer) for r in document["rows"])
        assert measured != (peer in document["missing"])


def test_generation(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "generation.json"
    document = script("generation").main(["--quick", "--out", str(path)])
    check_form(document, path, "generation")
    assert [r["bar"] for r in document["rows"]] == [1.03, 1.03, None]


def test_imports(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("imports")
    monkeypatch.setattr(module, "PEERS", "import json")
    monkeypatch.setattr(module, "CLI", [module.sys.executable, "-c", "pass"])
    path = tmp_path / "imports.json"
    document = module.main(["--quick", "--out", str(path)])
    check_form(document, path, "imports")
    assert [r["bar"] for r in document["rows"]] == [0.4, 0.3]
    monkeypatch.setattr(module, "CLI", [module.sys.executable, "-c", "raise SystemExit('why')"])
    failed = module.main(["--quick"])
    assert "why" in failed["missing"]["underhood --help"]


def test_pairs_take_turns(script: Any) -> None:
    common = script("common")
    calls: list[str] = []
    ratio, other, base = common.pairs(lambda: calls.append("b"), lambda: calls.append("o"), 2)
    assert calls == ["b", "o", "b", "o", "o", "b"]
    assert ratio > 0 and other > 0 and base > 0


def test_the_page_is_up_to_date(script: Any) -> None:
    report = script("report")
    assert report.PAGE.read_text() == report.render(report.load()), (
        "run: python benchmarks/report.py"
    )


def test_the_page_tells_a_missed_bar_and_a_busy_machine(script: Any) -> None:
    report = script("report")
    row = {
        "case": "c", "what": "w", "value": 1.2, "unit": "x", "seconds": 0.012,
        "base_seconds": 0.01, "bar": 1.1, "runs": 3,
    }  # fmt: skip
    machine = {
        "processor": "P", "cores": 2, "threads": 1, "system": "S", "load_before": 0.9,
        "versions": {"torch": "2"},
    }  # fmt: skip
    document = {
        "name": "n", "title": "T", "about": "A", "rows": [row, {**row, "bar": 1.3}],
        "missing": {"peer": "not installed"}, "date": "D", "command": "C", "machine": machine,
    }  # fmt: skip
    page = report.render([document])
    assert "| c | w | 12.0 ms | 10.0 ms | 1.200 x | ≤ 1.1 x | **missed** |" in page
    assert "| ≤ 1.3 x | holds |" in page
    assert "not measured: peer: not installed" in page and "read the numbers as rough" in page
