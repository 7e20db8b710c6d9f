"""`underhood check`: prove that every site means what its name says in a model."""

from typing import Any

import typer

from underhood.cli import options, render

__all__ = ["check"]


def check(
    model: options.ModelArgument = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Prove that every site means what its name says in this model.

    Taps on equals taps off, patterns sum to one, the parts of the stream add up, an edit acts, a
    batch equals its rows, cached equals uncached. Exit code 1 when a check fails.
    """
    loaded = options.load_model(model, device, dtype, quiet=quiet)
    with render.working(f"checking {loaded.name}", quiet=quiet):
        report = loaded.check()
    if json:
        render.document(_document(loaded.name, report))
    else:
        columns = ("check", "status", "value", "reason")
        render.table(columns, [(r.name, r.status, r.value, r.reason) for r in report.rows])
        render.note(_summary(loaded.name, report), quiet=quiet)
    if not report.ok:
        raise typer.Exit(1)


def _document(name: str, report: Any) -> dict[str, Any]:
    rows = [
        {"name": r.name, "status": r.status, "value": r.value, "reason": r.reason}
        for r in report.rows
    ]
    return {"schema": "check/1", "model": name, "ok": report.ok, "rows": rows}


def _summary(name: str, report: Any) -> str:
    counts = [
        f"{n} {status}"
        for status in ("ok", "failed", "not offered")
        if (n := sum(row.status == status for row in report.rows))
    ]
    return f"{name}: {', '.join(counts) or 'nothing to check'}"
