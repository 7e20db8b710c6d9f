"""The coverage table: every family's self-check, as `docs/coverage.md` shows it.

`python -m underhood.coverage` writes the table; `--check` compares it with what is there. It builds
a tiny random model of each family and runs every law of `core.check` on it, so it needs no network.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from underhood.core.check import LAWS, CheckReport
from underhood.core.errors import UnderhoodError
from underhood.core.model import Model
from underhood.core.site import KINDS
from underhood.organisms.tiny import FAMILIES, tiny

__all__ = ["family_report", "row", "table"]

PAGE = Path("docs") / "coverage.md"
MARKS = {"ok": "yes", "failed": "**no**", "not offered": "-"}


def family_report(family: str) -> tuple[Model, CheckReport]:
    """A family's tiny model and its self-check."""
    made = tiny(family)
    model = Model(made.module, name=family)
    inputs: Any = made.inputs(batch=2, length=9)
    if made.kind in ("causal", "masked"):
        inputs = {"input_ids": inputs["input_ids"]}
    if made.kind == "plain":
        inputs = next(iter(inputs.values()))
    return model, model.check(inputs)


def _missing(model: Model) -> str:
    """Names that the family offers in no layer, without those that need another kind of model."""
    if not model.anatomy.stacks:
        return "only `module:` sites"
    offered = {s.name for s in model.sites()}
    usual = [n for n in KINDS if not n.startswith(("cross_", "ssm_", "expert_", "router_"))]
    return ", ".join(f"`{n}`" for n in usual if n not in offered) or "-"


def row(family: str) -> str:
    """A family's line of the table, from its self-check."""
    try:
        model, report = family_report(family)
    except UnderhoodError as error:
        return f"| {family} | " + " | ".join(["-"] * len(LAWS)) + f" | {error.what} |"
    marks = " | ".join(MARKS[found.status] for found in report.rows)
    return f"| {family} | {marks} | {_missing(model)} |"


def table(rows: Iterable[str]) -> str:
    """The page, as Markdown, from the lines of its families."""
    laws = list(LAWS)
    lines = [
        "# Coverage",
        "",
        "Every family below is built as a tiny random model from its transformers configuration,"
        " and every law of the self-check is run on it. `yes`: the law holds within 2e-5 of the"
        " largest value (recording: bit for bit). `-`: the family cannot state it, and"
        " `underhood check` gives the reason. Written by `python -m underhood.coverage`.",
        "",
        "Laws: " + "; ".join(f"{i + 1} {law}" for i, law in enumerate(laws)) + ".",
        "",
        "| family | " + " | ".join(str(i + 1) for i in range(len(laws))) + " | not offered |",
        "|---|" + "---|" * len(laws) + "---|",
    ]
    return "\n".join([*lines, *rows]) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it (`--check`); returns the exit code."""
    page = table(map(row, FAMILIES))
    if "--check" in arguments:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
        sys.stdout.write("up to date\n" if same else f"{PAGE} is stale\n")
        return 0 if same else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
