"""`underhood run`: any method, by its name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from underhood.cli import options, render

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.methods.registry import Method
    from underhood.view import Result

__all__ = ["run"]

SUFFIXES = (".json", ".html", ".csv", ".txt", ".png")
_Many = list[str] | None


def run(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A name that `underhood methods` lists.")
    ],
    prompt: Annotated[
        _Many, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be repeated.")
    ] = None,
    vs: Annotated[
        _Many, typer.Option(metavar="TEXT", help="The contrast of each prompt, for pairs.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of prompts or of pairs.")
    ] = None,
    answer: Annotated[
        _Many, typer.Option(metavar="TOKEN", help="The answer of each pair (one token).")
    ] = None,
    wrong: Annotated[
        _Many, typer.Option(metavar="TOKEN", help="The wrong answer of each pair (one token).")
    ] = None,
    setting: Annotated[
        _Many,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the method; repeatable."),
    ] = None,
    keep: options.Keep = None,
    dry_run: options.DryRun = False,
    output: options.Output = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    model: options.ModelOption = None,
    other: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel="Model", help="A second model, to compare."),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Run one method and show its result.

    `underhood methods` lists them; `underhood methods NAME` says what one reads and its options.
    With -o the suffix decides: .json keeps numbers and provenance, .html, .csv, .txt and .png the
    view.
    """
    options.check_output(output, SUFFIXES)
    from underhood.cli.arguments import Given, data_arguments, read_options
    from underhood.core.sweep import watched
    from underhood.methods.registry import find

    found = find(method)
    chosen = read_options(found, setting or ())
    given = Given(
        prompt or (), vs or (), answer or (), wrong or (), data,
        (lambda: options.load_model(other, device, dtype, quiet=quiet)) if other else None,
    )  # fmt: skip
    arguments = data_arguments(found, given)
    loaded = options.load_model(model, device, dtype, quiet=quiet)
    if dry_run:
        _plan(found, loaded, {**arguments, **chosen}, quiet=quiet)
        return
    what = f"running {found.name} on {loaded.name}"
    with render.counting(what, quiet=quiet) as count, watched(progress=count, folder=keep):
        result = found(loaded, **arguments, **chosen)
    _show(result, json=json)
    if output is not None:
        render.note(f"wrote {result.save(output)}", quiet=quiet)


def _plan(method: "Method", model: "Model", given: dict[str, Any], *, quiet: bool) -> None:
    """Print what each of a method's sweeps would take."""
    from underhood.core.errors import UnderhoodError
    from underhood.core.sweep import watched

    plans: list[Any] = []
    with render.working(f"planning {method.name} on {model.name}", quiet=quiet):
        try:
            with watched(dry=plans.append):
                method(model, **given)
        except UnderhoodError:
            if not plans:  # later ones may come of the unedited readings that it went on with
                raise
    for plan in plans:
        typer.echo(str(plan))
    if not plans:
        cost = " ".join(method.sections.get("Cost", "not stated").split())
        typer.echo(f"{method.name} makes no sweep. Cost: {cost}")
    elif len(plans) > 1:
        seconds = sum(plan.seconds for plan in plans)
        typer.echo(f"{len(plans)} sweeps, about {seconds:.2g} s together")


def _show(result: "Result", *, json: bool) -> None:
    if json:
        view = result.view.model_copy(update={"provenance": result.provenance})
        render.document(view.to_json(indent=1))
    else:
        render.show_view(result.view)
