"""`underhood serve`: the workbench in a browser, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from underhood.cli import options, render

__all__ = ["serve"]


def serve(
    model: options.ModelArgument = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; others need a --token.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: 8470, or a free one.")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
    token: Annotated[
        str | None, typer.Option(metavar="SECRET", help="Default: a new one each time.")
    ] = None,
    results: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where results are kept, and found again.")
    ] = Path("underhood-results"),
    device: options.Device = None,
    dtype: options.Dtype = None,
    quiet: options.Quiet = False,
) -> None:
    """Open the workbench: explain, look, cause, change, in a browser on this machine.

    Prints its address, secret included; stop it with Ctrl-C. Results are kept in a folder, as
    files that Python and the other commands open.
    """
    from underhood.workbench.guard import loopback
    from underhood.workbench.server import Server

    with render.working("starting", quiet=quiet):
        server = Server(
            model, results=results, host=host, port=port, token=token, device=device,
            dtype=dtype.value if dtype is not None else None,
        )  # fmt: skip
    if not loopback(host):
        render.note("anyone who can reach this address and has the token can use it", quiet=False)
    typer.echo(server.url)
    render.note(f"results go to {server.desk.shelf.folder}; stop with Ctrl-C", quiet=quiet)
    server.run(browser=open_)
