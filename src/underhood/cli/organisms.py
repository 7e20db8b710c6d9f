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
    help="The small models that come with the library: list (the default), show, check, build.",
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="An organism.")]


@organisms.command("list")
def show_all(
    json: options.Json = False,
    write: Annotated[bool, typer.Option("--write", help="Rewrite docs/organisms.md.")] = False,
) -> None:
    """List them with their sizes, tasks and accuracies on held-out prompts."""
    from underhood.organisms import card_of
    from underhood.organisms import organisms as names
    from underhood.organisms.page import PAGE, page

    if write:
        PAGE.write_text(page(), encoding="utf-8")
        render.note(f"wrote {PAGE}", quiet=False)
        return
    cards = [card_of(name) for name in names()]
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
    """Show an organism's card: what it can do, how well, what is inside, and its limits."""
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
    rows = [
        (t, v["accuracy"], v["n"], _more(v), what.tasks.get(t, "")) for t, v in card.tasks.items()
    ]
    render.table(("task", "accuracy", "prompts", "more", "what it does"), rows)
    if card.facts:
        typer.echo("")
        render.heading("what is inside")
        rows = [
            (f.name, ", ".join(f.parts), f.effect, f.control, f.unit, f.says) for f in card.facts
        ]
        render.table(("fact", "parts", "effect", "control", "unit", "in words"), rows)
    for heading, lines in (("limits", card.limits), ("commands", card.reproduce)):
        if lines:
            typer.echo("")
            render.heading(heading)
        for line in lines:
            typer.echo(f"- {line}")


@organisms.command()
def check(
    name: _Name,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts per task.")] = 500,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure an organism again from its weights, beside what its card says."""
    from underhood.organisms import organism

    what = organism(name)
    card = what.card
    with render.working(f"measuring {name}", quiet=quiet):
        found = what.evaluate(n=n)
    if json:
        render.document(found)
        return
    columns = ("task", "accuracy", "prompts", "accuracy on its card", "more")
    rows = [(t, v["accuracy"], v["n"], card.tasks.get(t, {}).get("accuracy"), _more(v))
            for t, v in found.items()]  # fmt: skip
    render.table(columns, rows)


@organisms.command()
def build(
    name: _Name,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Default: one in your cache.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint in the folder.")] = True,
    seed: Annotated[int, typer.Option(help="Of the weights and the examples.")] = 0,
    quiet: options.Quiet = False,
) -> None:
    """Make an organism again by its recipe, measure it, and write its weights and card."""
    from underhood.organisms import organism

    what = organism(name)
    folder = out or what.built
    render.note(f"building {name} into {folder}; stop with Ctrl-C, go on later", quiet=quiet)
    card = what.build(folder, steps=steps, seed=seed, resume=resume, progress=not quiet)
    rows = [(t, v["accuracy"], v["n"], _more(v)) for t, v in card.tasks.items()]
    render.table(("task", "accuracy", "prompts", "more"), rows)


def _more(measured: dict[str, Any]) -> str:
    """What else was measured, as words."""
    rest = {k: v for k, v in measured.items() if k not in ("accuracy", "n", "judged", "distinct")}
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in rest.items())  # fmt: skip
