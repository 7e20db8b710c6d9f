"""`underhood organisms`: the small models that come with the library, and how to train them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from underhood.cli import options, render

__all__ = ["organisms"]


class _ListByDefault(TyperGroup):
    """`underhood organisms` alone lists them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words, or those of the default."""
        return super().parse_args(ctx, args or ["list"])


organisms = typer.Typer(
    cls=_ListByDefault,
    help="The small models that come with the library: list (the default), show, check, train.",
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="An organism.")]


@organisms.command("list")
def show_all(json: options.Json = False) -> None:
    """List them with their sizes, tasks and accuracies on held-out prompts."""
    from underhood.organisms import organism
    from underhood.organisms import organisms as names

    cards = [organism(name).card for name in names()]
    if json:
        render.document([asdict(card) for card in cards])
        return
    rows = []
    for card in cards:
        tasks = (f"{name} {found['accuracy']:.3f}" for name, found in card.tasks.items())
        rows.append((card.name, card.parameters, ", ".join(tasks)))
    render.table(("organism", "parameters", "tasks, with accuracy on held-out prompts"), rows)


@organisms.command()
def show(name: _Name, json: options.Json = False) -> None:
    """Show an organism's card: what it has learned, how well, and its limits."""
    from underhood.organisms import organism

    what = organism(name)
    card = what.card
    if json:
        render.document(asdict(card))
        return
    render.heading(f"{card.name}: {card.summary}")
    facts = {"parameters": card.parameters, **card.architecture, "training seconds": card.seconds}
    render.table(("what", "value"), list(facts.items()), header=False)
    typer.echo("")
    columns = ("task", "accuracy", "probability", "prompts", "what it does")
    rows = [(*_numbers(t, v), what.task(t).summary) for t, v in card.tasks.items()]
    render.table(columns, rows)
    typer.echo("")
    render.heading("limits")
    for line in card.limits:
        typer.echo(f"- {line}")


@organisms.command()
def check(
    name: _Name,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts per task.")] = 500,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure an organism again from its shipped weights, beside what its card says."""
    from underhood.organisms import organism
    from underhood.organisms.card import evaluate

    card = organism(name).card
    with render.working(f"measuring {name}", quiet=quiet):
        found = evaluate(name, n=n)
    if json:
        render.document(found)
        return
    columns = ("task", "accuracy", "probability", "prompts", "accuracy on its card")
    rows = [(*_numbers(t, v), card.tasks.get(t, {}).get("accuracy")) for t, v in found.items()]
    render.table(columns, rows)


@organisms.command()
def train(
    name: _Name,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: ./NAME.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint in the folder.")] = True,
    seed: Annotated[int, typer.Option(help="Of the weights and the rows.")] = 0,
    quiet: options.Quiet = False,
) -> None:
    """Train an organism by its recipe and write its folder (`--model FOLDER` then loads it)."""
    from underhood.organisms import organism
    from underhood.organisms.trainer import train as library

    organism(name)  # a wrong name is refused before anything is announced
    folder = out or Path(name)
    render.note(f"training {name} into {folder}; stop with Ctrl-C, go on later", quiet=quiet)
    card = library(name, out=folder, steps=steps, seed=seed, resume=resume, progress=not quiet)
    render.table(("task", "accuracy", "probability", "prompts"),
                 [_numbers(t, v) for t, v in card.tasks.items()])  # fmt: skip


def _numbers(task: str, measured: dict[str, Any]) -> tuple[str, float, float, int]:
    return task, measured["accuracy"], measured["probability"], measured["n"]
