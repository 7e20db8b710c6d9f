"""All cards on one page, as `docs/organisms.md` shows them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from underhood.organisms import card_of, organisms
from underhood.organisms.card import Card

__all__ = ["PAGE", "page"]

PAGE = Path("docs") / "organisms.md"


def page() -> str:
    """The page, as Markdown, from the cards alone. Loads no weights."""
    cards = [card_of(name) for name in organisms()]
    trained = [card for card in cards if card.recipe]
    lines = [
        "# Organisms: models whose mechanism is known",
        "",
        "Small models that come with the library. `uh.load(NAME)` loads one; `uh.organism(NAME)`"
        " has its `.pairs(task)`, `.prompts(task)` and `.truth`; `underhood organisms show NAME`"
        " prints its card, `check NAME` measures it again, `build NAME` makes it again from"
        " nothing. Accuracies are on held-out prompts. Written by `underhood organisms list"
        " --write` from the cards.",
        "",
        "## Trained",
        "",
        *_table(("name", "what it is", "weights", "trained in"), (
            (_link(c.name), c.summary, f"{c.parameters:,}", f"{c.seconds:.0f} s")
            for c in trained)),
        "",
        "## Wired by hand",
        "",
        "Nothing is trained here: every weight was set, so what is inside is known exactly.",
        "",
        *_table(("name", "what it does", "weights", "facts"), (
            (f"`{c.name}`", c.summary, f"{c.parameters:,}", str(len(c.facts)))
            for c in cards if not c.recipe)),
    ]  # fmt: skip
    for card in trained:
        lines += ["", *_section(card)]
    return "\n".join(lines) + "\n"


def _section(card: Card) -> list[str]:
    lines = [f"## {card.name}", "", f"{card.summary}.", ""]
    lines += _table(("task", "accuracy", "prompts"), (
        (f"`{task}`", f"{found['accuracy']:.3f}", str(found["n"]))
        for task, found in card.tasks.items()))  # fmt: skip
    if card.facts:
        lines += ["", *_table(("fact", "parts", "effect", "control", "unit", "in words"), (
            (fact.name, ", ".join(f"`{part}`" for part in fact.parts), _number(fact.effect),
             _number(fact.control), fact.unit, f"{fact.says} ({fact.how})")
            for fact in card.facts))]  # fmt: skip
    if card.limits:
        lines += ["", *(f"- {limit}" for limit in card.limits)]
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(cells)} |".replace("\n", " ")
        for cells in (head, ["---"] * len(head), *([_cell(c) for c in row] for row in rows))
    ]


def _cell(text: str) -> str:
    """Bars would end the cell, and `<bos>` would be a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _link(name: str) -> str:
    """To the name's section."""
    return f"[{name}](#{name.replace('/', '')})"
