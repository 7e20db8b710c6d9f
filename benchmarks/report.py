"""Write docs/benchmarks.md from the JSON files in results/ (a test compares the two)."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
ORDER = (
    "recording",
    "generation",
    "sweep",
    "circuits",
    "relevance",
    "imports",
    "painting",
    "workbench",
)
BUSY = 0.5  # running processes per core before we began

HEAD = """# Benchmarks

Written by `python benchmarks/report.py` from `benchmarks/results/*.json`; do not edit by hand. Each
number is the median of runs that take turns in one process, so that whatever else the machine does
hits both sides. `make bench` measures again.
"""


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The result files, those of the known order first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(found, key=lambda d: (place.get(d["name"], len(place)), d["name"]))


def render(documents: list[dict[str, Any]]) -> str:
    """The page."""
    return "\n".join([HEAD, *(_section(d) for d in documents)])


def _section(document: dict[str, Any]) -> str:
    lines = [f"## {document['title']}", "", document["about"], ""]
    if document["rows"]:
        memory = any(row.get("bytes") for row in document["rows"])
        lines += [
            f"| case | what | {'took' if memory else 'time'} | compared with | result | bar | |",
            "|---|---|--:|--:|--:|--:|---|",
        ]
        lines += [*(_row(row) for row in document["rows"]), ""]
    for table in document.get("tables", []):
        lines += [*_table(table), ""]
    lines += [f"- not measured: {name}: {why}" for name, why in document["missing"].items()]
    lines += [""] if document["missing"] else []
    return "\n".join([*lines, _measured(document), ""])


def _row(row: dict[str, Any]) -> str:
    bar = row["bar"]
    cells = [
        row["case"],
        row["what"],
        _taken(row["seconds"], row.get("bytes")),
        _taken(row["base_seconds"], row.get("base_bytes")),
        _value(row["value"], row["unit"]),
        "" if bar is None else f"≤ {bar:g} {row['unit']}",
        "" if bar is None else ("holds" if row["value"] <= bar else "**missed**"),
    ]
    return f"| {' | '.join(cells)} |"


def _taken(seconds: float | None, held: int | None) -> str:
    if held is not None:
        return f"{held / 1e6:.1f} MB"
    return "" if seconds is None else _seconds(seconds)


def _table(table: dict[str, Any]) -> list[str]:
    def shown(cell: str | float | None) -> str:
        return "" if cell is None else cell if isinstance(cell, str) else f"{cell:.2f}"

    columns = list(zip(*table["rows"], strict=True))
    numbers = [all(not isinstance(c, str) for c in column) for column in columns]
    return [
        table["title"],
        "",
        f"| {' | '.join(table['columns'])} |",
        f"|{'|'.join('--:' if number else '---' for number in numbers)}|",
        *(f"| {' | '.join(map(shown, row))} |" for row in table["rows"]),
    ]


def _value(value: float, unit: str) -> str:
    return f"{value:.3f} x" if unit == "x" else _seconds(value)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1000:.1f} ms"


def _measured(document: dict[str, Any]) -> str:
    about = document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    timed = [row for row in document["rows"] if row["seconds"] is not None]
    busy = timed and about["load_before"] > BUSY  # what is not timed is the same on any machine
    note = (
        f" The machine was busy with other work ({about['load_before']:g} processes per core"
        " before the first run): read the numbers as rough." if busy else ""
    )  # fmt: skip
    runs = sorted({row["runs"] for row in timed})
    medians = f"; medians of {' and '.join(map(str, runs))} runs" if runs else ""
    return (
        f"Measured on {document['date']} with `{document['command']}`: {about['processor']},"
        f" {about['cores']} cores, {about['threads']} torch threads, {about['system']}; {versions}"
        f"{medians}.{note}"
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(load()))
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
