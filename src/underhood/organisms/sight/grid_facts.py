"""What training made of the walking policy: places that can be read off, heads that carry them."""

from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from underhood.organisms.base import Split
from underhood.organisms.card import Fact
from underhood.organisms.establish import establish, parts
from underhood.organisms.sight.grid import ACTIONS, SIDE, Grid, maze_of
from underhood.organisms.words import join

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["findings", "streams"]

# Prompts that the least squares are fitted on, and those that they are tested on.
_FITTED, _TESTED = 1500, 500
_SEED = 2


def findings(organism: Grid, model: "Model") -> tuple[Fact, ...]:
    """Least squares for two places that no word after the maze names; heads by exact ablation."""
    return (
        _place(organism, model, "goal place", "reach", "At the end of the maze"),
        _place(organism, model, "own place", "step", "After any number of actions"),
        establish(
            organism, model, "walking heads", "step", among=parts(model, "heads"), n=200, lost=0.4,
            says="Without {parts} the next action is wrong more often than without any other head.",
        ),
    )  # fmt: skip


def _place(organism: Grid, model: "Model", name: str, task: str, when: str) -> Fact:
    """Least squares from the last position's stream to one of 16 cells, at every layer."""
    what = "goal's" if name == "goal place" else "agent's own"
    goal = name == "goal place"
    seen, cells = streams(organism, model, task, _FITTED, "train", goal=goal)
    new, wanted = streams(organism, model, task, _TESTED, "test", goal=goal)
    shuffled = cells[torch.tensor(Random(name).sample(range(_FITTED), _FITTED))]
    found = [
        (_read_off(seen[layer], cells, new[layer], wanted),
         _read_off(seen[layer], shuffled, new[layer], wanted))
        for layer in range(model.n_layers)
    ]  # fmt: skip
    layer = max(range(len(found)), key=lambda i: found[i][0])
    all_layers = ", ".join(f"{right:.2f}" for right, _ in found)
    return Fact(
        name,
        f"{when} the {what} cell can be read off the stream by a linear map, best after block "
        f"{layer}.",
        (f"resid_post.{layer}",),
        task,
        *found[layer],
        "share of cells found",
        f"least squares to 16 cells at the last position, fitted on {_FITTED} training prompts, "
        f"tested on {_TESTED} held-out ones; after each block: {all_layers}; control: fitted to "
        "shuffled cells",
    )


def streams(
    organism: Grid, model: "Model", task: str, n: int, split: Split, *, goal: bool
) -> tuple[list[Tensor], Tensor]:
    """Per layer the stream at the last position `[n, d_model]`, and the cell it should tell."""
    words = [case.words for case in organism.cases(task, n, _SEED, split)]
    run = model.run([join(row) for row in words], record=["resid_post"], at=-1)
    streams = [run["resid_post", i][:, 0].double() for i in range(model.n_layers)]
    mazes = [maze_of(row) for row in words]
    walked = [sum(ACTIONS.get(word, 0) for word in row[SIDE * (SIDE + 1) :]) for row in words]
    cells = [m.goal if goal else m.agent + by for m, by in zip(mazes, walked, strict=True)]
    return streams, torch.tensor(cells)


def _read_off(seen: Tensor, cells: Tensor, new: Tensor, wanted: Tensor) -> float:
    """Accuracy on `new` of least squares from `seen` to one-hot cells."""
    known, asked = (torch.cat([x, torch.ones_like(x[:, :1])], 1) for x in (seen, new))
    # Not lstsq: its result for a stream that does not have full rank depends on the driver.
    weights = torch.linalg.pinv(known) @ torch.eye(SIDE * SIDE, dtype=known.dtype)[cells]
    return round(float(((asked @ weights).argmax(1) == wanted).double().mean()), 3)
