"""Every way of scoring edges on every model whose circuit is known, as `docs/circuits.md` shows it.

`underhood bench circuits` prints the tables; `--write` rewrites the page. The models are wired by
hand or compiled from a small program (`organisms.wired`), so the truth is not a matter of opinion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from underhood.circuits.acdc import acdc_scores
from underhood.circuits.circuit import Scores
from underhood.circuits.faithfulness import Judge, random_circuits
from underhood.circuits.score import METHODS, edge_scores
from underhood.circuits.truth import Recovery, recovery
from underhood.circuits.wiring import Wiring
from underhood.core.errors import NotOffered
from underhood.data import EncodedPairs, metric_named
from underhood.organisms.wired_models import WIRED, wired
from underhood.organisms.wired_organism import Wired

__all__ = ["COLUMNS", "Row", "circuit_bench", "page"]

PAGE = Path("docs") / "circuits.md"
PROMPTS, TARGET = 16, 0.9
COLUMNS: dict[str, tuple[str, int]] = {
    "exact": ("exact", 0), "eap": ("eap", 0), "clean-corrupted": ("clean-corrupted", 0),
    "eap-ig, 5 steps": ("eap-ig", 5), "eap-ig, 100 steps": ("eap-ig", 100),
    "eap-ig-activations, 5": ("eap-ig-activations", 5), "relp": ("relp", 0), "acdc": ("acdc", 0),
    "ifr": ("ifr", 0), "random": ("random", 0),
}  # fmt: skip
"""Columns of the table: the method and its steps."""


@dataclass(frozen=True, slots=True)
class Row:
    """One organism: how well each way of scoring finds its circuit.

    Attributes:
        organism: The organism.
        found: By column; None where the way of scoring is not defined for the model.
        size: Edges of the smallest circuit of the exact ranking that keeps `TARGET`.
        kept: Its faithfulness.
        random: Mean faithfulness of random circuits of the same size.
        missing: True edges that it leaves out.
        extra: False edges that it holds.
    """

    organism: Wired
    found: dict[str, Recovery | None]
    size: int
    kept: float
    random: float
    missing: tuple[str, ...]
    extra: int


def circuit_bench(
    names: Sequence[str] = WIRED,
    columns: Sequence[str] = tuple(COLUMNS),
    *,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Score the edges of wired organisms in every way, and compare with the truth.

    Args:
        names: Some of `WIRED`.
        columns: Some of `COLUMNS`; "exact" is always run.
        progress: Called with each organism's name before it is run.
    """
    rows = []
    for name in names:
        if progress is not None:
            progress(name)
        rows.append(_row(wired(name), columns))
    return rows


def _row(organism: Wired, columns: Sequence[str]) -> Row:
    wiring = Wiring(organism.model)
    pairs = organism.pairs(n=PROMPTS).encode(organism.model)
    metric = metric_named("logit_diff")
    truth = organism.truth.edges["resample"]
    exact = edge_scores(wiring, pairs, metric, method="exact")
    found: dict[str, Recovery | None] = {}
    for column in columns:
        scores = exact if column == "exact" else _scores(wiring, pairs, *COLUMNS[column])
        found[column] = recovery(scores, truth) if scores is not None else None
    judge = Judge(wiring, pairs, metric)
    circuit, kept = judge.search(exact, TARGET)
    chance = judge.faithfulness(random_circuits(circuit, 5))
    edges = set(circuit.edges)
    return Row(
        organism, found, len(circuit), kept, float(chance.mean()),
        tuple(sorted(truth - edges)), len(edges - truth),
    )  # fmt: skip


def _scores(wiring: Wiring, pairs: EncodedPairs, method: str, steps: int) -> Scores | None:
    metric = metric_named("logit_diff")
    if method == "acdc":
        return acdc_scores(Judge(wiring, pairs, metric), (0.001, 0.01, 0.1, 1.0))
    assert method in METHODS
    try:
        return edge_scores(wiring, pairs, metric, method=method, steps=max(1, steps))
    except NotOffered:
        return None


def _short(row: Row) -> str:
    return row.organism.name.removeprefix("wired/")


def page(rows: Sequence[Row]) -> str:
    """The page, as Markdown."""
    columns = list(rows[0].found)
    lines = [
        "# Circuits that are known",
        "",
        "Small transformers whose weights were set by hand, or compiled from a small program, with"
        " every true edge known (`underhood organisms show wired/NAME` says why each is true). An"
        " edge is true when the logit difference changes if that edge alone carries the contrast's"
        " value. Written by `underhood bench circuits --write`; the numbers are of 16 pairs each.",
        "",
        "## Does the ranking find the true edges?",
        "",
        "AUROC over the whole ranking (1: every true edge before every false one; 0.5: chance) /"
        " precision among as many edges as are true. Ranked by size; scores below a millionth of"
        " the largest count as ties. `-`: not defined for this model.",
        "",
        "| organism | true / all edges | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        truth = row.organism.truth.edges["resample"]
        cells = " | ".join(_cell(row.found[c]) for c in columns)
        edges = f"{len(truth)} / {len(row.organism.edges)}"
        lines.append(f"| {_short(row)} | {edges} | {cells} |")
    lines += [
        "",
        "The same as InterpBench counts it (ten sizes, greedy selection, coarse):",
        "",
        "| organism | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = " | ".join(
            f"{found.auroc_mib:.2f}" if (found := row.found[c]) else "-" for c in columns
        )
        lines.append(f"| {_short(row)} | {cells} |")
    return "\n".join([*lines, *_circuits(rows)]) + "\n"


def _cell(found: Recovery | None) -> str:
    return "-" if found is None else f"{found.auroc:.2f} / {found.precision:.2f}"


def _circuits(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        f"## Is the circuit that keeps {TARGET:.0%} the true one?",
        "",
        "The smallest circuit of the exact ranking that keeps at least that much, beside random"
        " circuits of its size. A true edge that works *against* the answer can be left out"
        " without loss (backup), and where parts stand in for each other or effects cancel the"
        " smallest circuit is not the whole truth (redundant, linear): keeping the behaviour is"
        " not the same as being the mechanism.",
        "",
        "| organism | edges | keeps | random keep | true edges left out | false edges in it |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        missing = ", ".join(f"`{e}`" for e in row.missing[:3]) or "none"
        more = f" and {len(row.missing) - 3} more" if len(row.missing) > 3 else ""
        lines.append(
            f"| {_short(row)} | {row.size} | {row.kept:.2f}"
            f" | {round(row.random, 2) + 0.0:.2f} | {missing}{more} | {row.extra} |"
        )
    return lines
