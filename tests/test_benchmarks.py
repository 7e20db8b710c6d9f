"""The benchmarks run and write what the page is made of; times are nobody's business here."""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROW = {
    "case", "what", "value", "unit", "seconds", "base_seconds", "bar", "runs", "bytes",
    "base_bytes",
}  # fmt: skip


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
    assert document["rows"] or document["tables"]
    for row in document["rows"]:
        assert set(row) == ROW and row["unit"] in ("x", "s") and row["runs"] >= 1
        assert (row["seconds"] or row["bytes"]) > 0 and isinstance(row["value"], float)
    for table in document["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


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


def test_circuits(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "circuits.json"
    document = script("circuits").main(["--quick", "--threads", "1", "--out", str(path)])
    check_form(document, path, "circuits")
    assert {row["case"] for row in document["rows"]} == {"differ from 10", "differ from 0"}
    compared = [r for r in document["rows"] if "over the published algorithm" in r["what"]]
    assert bool(compared) != ("TransformerLens" in document["missing"])
    assert ("479 edges: Pearson 1.0000" in document["about"]) == bool(compared)


def test_two_scores_must_agree_before_they_are_compared(script: Any) -> None:
    circuits = script("circuits")
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    real = torch.ones(4, 5, dtype=torch.bool)
    assert "20 edges: Pearson 1.0000" in circuits.agreement(scores, scores / circuits.PAIRS, real)
    with pytest.raises(ValueError, match="do not compute the same"):
        circuits.agreement(scores, -scores / circuits.PAIRS, real)


def test_relevance(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "relevance.json"
    document = script("relevance").main(["--quick", "--out", str(path)])
    check_form(document, path, "relevance")
    assert [table["title"] for table in document["tables"]] == [
        "`attn_out`", "`mlp_out`", "`resid_pre`"
    ]  # fmt: skip
    for table in document["tables"]:
        assert [row[0] for row in table["rows"]] == ["indirect_object", "induction"]
        for row in table["rows"]:
            estimates, chance = row[3:-1], row[-1]
            assert all(-1 <= x <= 1 for x in estimates) and 0 < chance < max(estimates)


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_painting(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "painting.json"
    document = script("painting").main(["--quick", "--out", str(path)])
    check_form(document, path, "painting")
    assert [(r["what"], r["bar"]) for r in document["rows"]] == [
        ("800 cells", 0.1), ("400 edges", 0.5), ("2 x 2 heads", 1.0)
    ]  # fmt: skip


def test_peak_memory_is_what_a_call_holds_at_once(script: Any) -> None:
    common = script("common")
    kept = torch.ones(1 << 20)  # held before: not counted

    def call() -> torch.Tensor:
        first = torch.ones(3 << 18)
        del first
        second = torch.ones(1 << 18)
        return second + kept[: 1 << 18]

    assert common.peak_bytes(call) == pytest.approx(3 << 20, rel=1e-3)
    row = common.memory_against(call, lambda: torch.ones(3 << 17), case="c", what="w", bar=0.5)
    assert row.value == pytest.approx(0.5, rel=1e-3) and row.seconds is None


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
    held = {**row, "seconds": None, "base_seconds": None, "bytes": 5_000_000, "value": 0.5,
            "base_bytes": 10_000_000}  # fmt: skip
    table = {"title": "`mlp_out`", "columns": ["task", "AtP"], "rows": [["a", 0.123], ["b", None]]}
    more = {**document, "rows": [held], "tables": [table]}
    page = report.render([document, more, {**more, "rows": []}])
    assert "| c | w | 5.0 MB | 10.0 MB | 0.500 x | ≤ 1.1 x | holds |" in page
    assert "| task | AtP |\n|---|--:|\n| a | 0.12 |\n| b |  |" in page
    assert "| c | w | 12.0 ms | 10.0 ms | 1.200 x | ≤ 1.1 x | **missed** |" in page
    assert "| ≤ 1.3 x | holds |" in page
    assert "not measured: peer: not installed" in page and "read the numbers as rough" in page
