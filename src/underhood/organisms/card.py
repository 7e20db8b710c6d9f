"""The data sheet of an organism: how well it does and what is known to be inside, as measured."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from underhood.core.errors import FileProblem

__all__ = ["CARD", "Card", "Fact"]

CARD = "card.json"


@dataclass(frozen=True)
class Fact:
    """One thing that is known to be inside a model.

    Attributes:
        name: Such as "induction" or "backdoor direction"; unique within an organism.
        says: One sentence.
        parts: What it is about, as text: heads `a1.h2`, MLPs `m3`, neurons `m1.n7`, experts
            `m0.e3`, layers `l2`, any site (`resid_post.2`), or edges (`a0.h1->a1.h0<k>`).
        task: The task it serves, if one.
        effect: Its size, in `unit`.
        control: The same number for the control that `how` names.
        unit: Of both.
        how: How it was established: by whose hand, or by which measurement against what.
    """

    name: str
    says: str
    parts: tuple[str, ...] = ()
    task: str | None = None
    effect: float | None = None
    control: float | None = None
    unit: str = ""
    how: str = ""


@dataclass(frozen=True)
class Card:
    """The data sheet of an organism, kept as `card.json` beside the weights.

    Attributes:
        name: The organism.
        summary: What it is about.
        parameters: Number of weights.
        architecture: Class and sizes.
        recipe: Steps, learning rate, seed: all that training needs; empty where nothing is trained.
        seconds: Processor time of the training steps, on one core (in older cards wall time).
        tasks: Per task `accuracy` on held-out prompts, how many (`n`), and what else tells.
        facts: What is known to be inside.
        limits: Known weaknesses.
        reproduce: The commands that build it and that give the numbers again.
    """

    name: str
    summary: str
    parameters: int
    architecture: dict[str, Any]
    recipe: dict[str, Any]
    seconds: float
    tasks: dict[str, dict[str, Any]]
    facts: list[Fact] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    reproduce: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write `card.json` into a folder, which is made when missing."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / CARD).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Card":
        """Read `card.json` of a folder.

        Raises:
            FileProblem: No card there, or not one.
        """
        path = folder / CARD
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            values = {field.name: found[field.name] for field in fields(cls)}
            values["facts"] = [Fact(**fact | {"parts": tuple(fact["parts"])})
                               for fact in values["facts"]]  # fmt: skip
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileProblem(
                "There is no card to read.",
                given=path,
                why=f"{type(error).__name__}: {error}",
                do="Build the organism: `underhood organisms build NAME`.",
            ) from error
