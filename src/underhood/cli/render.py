"""Showing things: tables, documents, views, notes and refusals.

Results go to stdout: drawn for a terminal, tab-separated for a pipe. Everything else goes to
stderr. Text from models and files is never read as markup, and its control characters are written
out, so a prompt cannot drive the terminal.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from underhood.core.errors import UnderhoodError
    from underhood.view import View

__all__ = [
    "counting", "document", "heading", "note", "one_line", "refuse", "show_view", "stdout",
    "steps", "table", "terminal", "working",
]  # fmt: skip

# Control characters, line separators, and marks that turn the direction of the text around them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
STATES = {"ok": "green", "failed": "bold red", "not offered": "dim", "absent": "dim"}
"""How a row's state is coloured, wherever there is a column of states."""


def terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def stdout() -> "Console":
    """The console for results; plain unless a person reads it, and without colour by NO_COLOR."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _stderr() -> "Console":
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def one_line(value: object) -> str:
    """A cell's text: on one line, control characters written out, nothing for None."""
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def document(value: Any) -> None:
    """A JSON document on stdout, from text or from plain Python."""
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
    typer.echo(text)


def heading(text: str) -> None:
    """A title: bold in a terminal, a `# ` line elsewhere."""
    if terminal():
        stdout().print(one_line(text), style="bold")
    else:
        typer.echo(f"# {one_line(text)}")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, header: bool = True) -> None:
    """Rows under columns: aligned in a terminal, tab-separated elsewhere."""
    if not terminal():
        lines = [list(columns)] if header else []
        lines += [[one_line(cell) for cell in row] for row in rows]
        typer.echo("\n".join("\t".join(line) for line in lines))
        return
    from rich.table import Table
    from rich.text import Text

    out = Table(box=None, pad_edge=False, show_header=header, header_style="dim", padding=(0, 1))
    for i, name in enumerate(columns):
        numbers = [isinstance(row[i], int | float) for row in rows if row[i] is not None]
        last = i == len(columns) - 1
        # Only the last column, of prose, is folded; addresses stay whole as long as they fit.
        out.add_column(
            name,
            justify="right" if numbers and all(numbers) else "left",
            overflow="fold",
            ratio=1 if last else None,
        )
    shown = zip(*[_alike([row[i] for row in rows]) for i in range(len(columns))], strict=True)
    for row in shown:
        out.add_row(*[Text(cell, style=STATES.get(cell, "")) for cell in row])
    stdout().print(out)


def _alike(cells: list[object]) -> list[str]:
    """A column's cells as text; its fractions get equally many decimals, so that they line up."""
    floats = [abs(cell) for cell in cells if isinstance(cell, float) and cell]
    plain = all(1e-3 <= size < 1e5 for size in floats)
    texts = [f"{size:.4f}".rstrip("0") for size in floats]
    decimals = max([len(text.partition(".")[2]) for text in texts], default=1)
    shown = []
    for cell in cells:
        if isinstance(cell, float) and plain:
            shown.append(f"{cell:.{max(decimals, 1)}f}")
        elif isinstance(cell, float):
            shown.append(f"{cell:.1e}" if cell else "0")
        elif isinstance(cell, int) and not isinstance(cell, bool):
            shown.append(f"{cell:,}")
        else:
            shown.append(one_line(cell))
    return shown


def show_view(view: "View") -> None:
    """A view: its picture in characters in a terminal, its numbers elsewhere."""
    if terminal():
        stdout().print(view.text())
    else:
        from underhood.view.text import to_plain

        typer.echo(to_plain(view), nl=False)


def note(text: str, *, quiet: bool = False) -> None:
    """One line on stderr."""
    if not quiet:
        _stderr().print(one_line(text), style="dim")


@contextmanager
def working(what: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing where no terminal is."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    with _stderr().status(f"{one_line(what)} ..."):
        yield


@contextmanager
def counting(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Like `working`, with a bar once what is yielded has been called with done and total.

    Nothing is shown where no terminal is.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}", markup=False)
    bars = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(SpinnerColumn(), text, *bars, console=_stderr(), transient=True) as bar:
        task = bar.add_task(f"{one_line(what)} ...", total=None)

        def show(done: int, total: int) -> None:
            if done < bar.tasks[0].completed:  # the next of several jobs
                bar.reset(task, total=total)
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def steps(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; call what is yielded with a step's name, its number and how many.

    Nothing is shown where no terminal is.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda name, number, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=_stderr(), transient=True) as bar:
        task = bar.add_task("")
        yield lambda name, number, total: bar.update(
            task, description=one_line(name), completed=number, total=total
        )


def refuse(error: "UnderhoodError") -> None:
    """An error's message on stderr: what happened in red, then given, because and instead."""
    from rich.text import Text

    what, *rest = str(error).splitlines()
    message = Text(f"{type(error).__name__}: {what}", style="bold red")
    for line in rest:
        message.append(f"\n{line}", style="not bold red")
    _stderr().print(message)
