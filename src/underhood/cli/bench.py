"""`underhood bench`: measure methods against models whose mechanism is known."""

from typing import Annotated

import typer

from underhood.cli import options, render

__all__ = ["bench"]

bench = typer.Typer(
    no_args_is_help=True, help="Measure methods against models whose mechanism is known."
)


@bench.command()
def circuits(
    names: Annotated[
        list[str] | None, typer.Argument(help="Organisms to run; all if none is named.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Rewrite docs/circuits.md in this folder.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Score the edges of every wired organism in every way, and compare with the true circuit."""
    from underhood import bench as logic
    from underhood.core.errors import UsageError

    if write and names:
        raise UsageError("the page holds all organisms", given=", ".join(names), do="name none")
    with render.working("scoring edges of wired organisms", quiet=quiet):
        rows = logic.circuit_bench(tuple(names) if names else logic.WIRED)
    text = logic.page(rows)
    if write:
        logic.PAGE.parent.mkdir(exist_ok=True)
        logic.PAGE.write_text(text, encoding="utf-8")
        render.note(f"wrote {logic.PAGE}", quiet=quiet)
    else:
        typer.echo(text)
