"""All commands under one name, and the one place where errors become messages and exit codes."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from underhood.cli import render
from underhood.cli.bench import bench
from underhood.cli.check import check
from underhood.cli.doctor import doctor
from underhood.cli.explain import explain
from underhood.cli.generate import generate
from underhood.cli.inspect import inspect
from underhood.cli.methods import methods
from underhood.cli.organisms import organisms
from underhood.cli.run import run
from underhood.cli.serve import serve
from underhood.core.errors import UnderhoodError

__all__ = ["app"]


class Commands(TyperGroup):
    """Commands whose refusals are messages, not tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except UnderhoodError as error:
            render.refuse(error)
            interrupted = isinstance(error.__cause__, KeyboardInterrupt)
            raise typer.Exit(130 if interrupted else error.exit_code) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of a first visit, not of the alphabet."""
        return list(self.commands)


app = typer.Typer(
    name="underhood",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    pretty_exceptions_show_locals=False,  # locals hold tensors, prompts and tokens of the hub
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(value: bool) -> bool:
    if value:
        from underhood import __version__

        typer.echo(f"underhood {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """See inside a neural network, find what causes a behaviour, and change it.

    Without --model every command works on the small model that is built in, offline.
    """


UNDERSTAND, LOOK, CARE = "Understand and change", "Look around", "Health"
for _command, _panel in (
    (explain, UNDERSTAND), (run, UNDERSTAND), (generate, UNDERSTAND), (serve, UNDERSTAND),
    (methods, LOOK), (inspect, LOOK),
):  # fmt: skip
    app.command(rich_help_panel=_panel)(_command)
app.add_typer(organisms, name="organisms", rich_help_panel=LOOK)
app.add_typer(bench, name="bench", rich_help_panel=CARE)
for _command in (check, doctor):
    app.command(rich_help_panel=CARE)(_command)
