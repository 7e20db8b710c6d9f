"""The bench of known circuits, and that its page says what it finds."""

from pathlib import Path

import pytest

from underhood import bench
from underhood.organisms import WIRED

PAGE = Path(__file__).parents[1] / "docs" / "circuits.md"
QUICK = ("exact", "eap", "eap-ig, 5 steps", "ifr", "random")


@pytest.mark.parametrize("name", ["induction", "gqa", "backup", "hist"])
def test_the_page_is_what_the_bench_finds(name: str) -> None:
    """Each column of a few organisms, made again; the whole page: `underhood bench circuits`."""
    (row,) = bench.circuit_bench([name], QUICK)
    written = PAGE.read_text(encoding="utf-8").splitlines()
    columns = list(bench.COLUMNS)
    lines = [line.strip("| ").split(" | ") for line in written if line.startswith(f"| {name} |")]
    assert len(lines) == 3, "run `underhood bench circuits --write`"
    for column in QUICK:
        found = row.found[column]
        assert found is not None
        cell = lines[0][2 + columns.index(column)]
        assert cell == f"{found.auroc:.2f} / {found.precision:.2f}"
        assert lines[1][1 + columns.index(column)] == f"{found.auroc_mib:.2f}"
    assert lines[2][1:3] == [str(row.size), f"{row.kept:.2f}"]


def test_every_organism_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in WIRED)
    head = next(line for line in text.splitlines() if line.startswith("| organism | true"))
    assert head.strip("| ").split(" | ")[2:] == list(bench.COLUMNS)
