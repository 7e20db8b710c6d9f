"""`underhood explain`: the main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from underhood.cli import options, render

if TYPE_CHECKING:
    from underhood.explanation import Explanation

__all__ = ["explain"]

REPORT = Path("report.html")
SUFFIXES = (".html", ".json")


def explain(
    prompt: Annotated[str, typer.Argument(help="What the model reads.")],
    vs: Annotated[
        str | None,
        typer.Option(
            metavar="CONTRAST",
            help="A prompt of as many tokens that calls for another answer; shows what is due to"
            " the difference.",
        ),
    ] = None,
    answer: options.Answer = None,
    wrong: options.Wrong = None,
    output: options.Output = None,
    json: options.Json = False,
    open_: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the report in a browser.")
    ] = False,
    quiet: options.Quiet = False,
    model: options.ModelOption = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Say why the model answers as it does, and prove it: a short answer and a report.

    Writes report.html (or the file of -o; .json for the numbers). With --json the document is
    printed, and a file is written only when -o names one.
    """
    options.check_output(output, SUFFIXES)
    loaded = options.load_model(model, device, dtype, quiet=quiet)
    import underhood

    with render.steps(quiet=quiet) as progress:
        found = underhood.explain(loaded, prompt, vs, answer=answer, wrong=wrong, progress=progress)
    if json:
        render.document(found.to_json())
    else:
        _print(found)
    path = output or (None if json and not open_ else REPORT)
    if path is not None:
        found.save(path)
        render.note(f"wrote {path} ({path.stat().st_size / 1000:,.0f} kB)", quiet=quiet)
        if open_:
            _open(path)


def _print(found: "Explanation") -> None:
    lines = [render.one_line(line) for line in found.lines()]
    if not render.terminal():
        typer.echo("\n".join(lines))
        return
    from rich.table import Table

    out = Table.grid(padding=(0, 1))
    for line in lines:
        out.add_row("•", line)
    render.stdout().print(out)


def _open(path: Path) -> None:
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        render.note(f"no browser was found; open {path} yourself")
