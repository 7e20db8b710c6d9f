"""A policy whose actions are words: it reads a small maze and walks to the goal.

The words of a prompt are the maze, row by row, and the actions so far:

    agent free wall free, free free wall goal, wall free free free, free free free wall. right down

Each of the 16 cells is free, wall, agent (where it started) or goal, 3 to 5 of them walls; a comma
ends a row, a full stop the maze. The next word is an action, `up down left right`, or `stop` on
the goal. Nothing shows where the agent is now: the policy must add up its own actions.

It imitates shortest paths (found by breadth-first search, one drawn at random where there are
several), so every action that lies on a shortest path is right. Whole layouts of walls are held
out: one in seven is never seen in training, whatever the places of agent and goal.

Established on the trained weights (`grid_facts.py`): where the goal's place can be read
off the stream by least squares, and the agent's own, which no word shows, against shuffled labels;
and the heads that the next action needs, by mean ablation against as many random ones.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from underhood.organisms.base import PROMPTS, SEED, Recipe, held_out
from underhood.organisms.card import Fact
from underhood.organisms.language import Case, Language, Phase, Row, Task
from underhood.organisms.words import PUNCTUATION, SPECIAL, join

if TYPE_CHECKING:
    from underhood.core.model import Model

__all__ = ["ACTIONS", "ORGANISM", "SIDE", "STOP", "Grid", "Maze", "a_maze", "maze_of"]

SIDE = 4
ACTIONS = {"up": -SIDE, "down": SIDE, "left": -1, "right": 1}
"""Each action, and by how much it changes the number of the cell."""
STOP = "stop"
CELLS = ("free", "wall", "agent", "goal")

# Least and most walls of a maze.
_WALLS = (3, 5)
# A path may be so much longer than the shortest one.
_SLACK = 2
_FAR = SIDE * SIDE
# Of every cell, where each action leads that does not leave the maze.
_BESIDE = [
    {action: cell + by for action, by in ACTIONS.items()
     if 0 <= cell + by < SIDE * SIDE and (abs(by) > 1 or cell // SIDE == (cell + by) // SIDE)}
    for cell in range(SIDE * SIDE)
]  # fmt: skip


@dataclass(frozen=True)
class Maze:
    """A maze of `SIDE` x `SIDE` cells, numbered row by row.

    Attributes:
        walls: Cells that cannot be entered.
        agent: Where the agent starts.
        goal: Where it wants to be; it can be reached.
    """

    walls: frozenset[int]
    agent: int
    goal: int

    @property
    def words(self) -> tuple[str, ...]:
        """The maze as the policy reads it."""
        out: list[str] = []
        for cell in range(SIDE * SIDE):
            kinds = (cell in self.walls, cell == self.agent, cell == self.goal)
            out.append(CELLS[1 + kinds.index(True)] if any(kinds) else CELLS[0])
            if cell % SIDE == SIDE - 1:
                out.append("," if cell < SIDE * SIDE - 1 else ".")
        return tuple(out)

    def step(self, cell: int, action: str) -> int | None:
        """Where an action leads; None: against a wall or out of the maze."""
        there = _BESIDE[cell].get(action)
        return None if there in self.walls else there

    def distances(self, goal: int) -> list[int]:
        """Steps from every cell to a goal, by breadth-first search; `_FAR`: there is no way."""
        found = [_FAR] * (SIDE * SIDE)
        found[goal] = 0
        queue = deque([goal])
        while queue:
            cell = queue.popleft()
            for there in _BESIDE[cell].values():
                if found[there] == _FAR and there not in self.walls:
                    found[there] = found[cell] + 1
                    queue.append(there)
        return found

    def best(self, cell: int, away: Sequence[int] | None = None) -> tuple[str, ...]:
        """All actions on a shortest path from a cell to the goal; `stop` on it.

        Args:
            cell: Where the agent is.
            away: `distances(goal)`, if they are known.
        """
        if cell == self.goal:
            return (STOP,)
        away = away or self.distances(self.goal)
        steps = ((action, self.step(cell, action)) for action in ACTIONS)
        return tuple(a for a, there in steps if there is not None and away[there] < away[cell])

    def path(self, rng: Random) -> tuple[str, ...]:
        """The actions of one shortest path, drawn at random; without `stop`."""
        cell, out, away = self.agent, [], self.distances(self.goal)
        while cell != self.goal:
            action = rng.choice(self.best(cell, away))
            cell += ACTIONS[action]
            out.append(action)
        return tuple(out)

    @property
    def key(self) -> str:
        """What is held out together: the layout of the walls."""
        return "maze:" + ",".join(map(str, sorted(self.walls)))


def a_maze(rng: Random) -> Maze:
    """A random maze whose goal can be reached from the agent's cell."""
    while True:
        walls = frozenset(rng.sample(range(SIDE * SIDE), rng.randint(*_WALLS)))
        agent, goal = rng.sample(sorted(set(range(SIDE * SIDE)) - walls), 2)
        maze = Maze(walls, agent, goal)
        if maze.distances(goal)[agent] < _FAR:
            return maze


def step(rng: Random) -> Case:
    """The next action, somewhere along a shortest path. Contrast: the goal lies elsewhere."""
    maze = a_maze(rng)
    path = maze.path(rng)
    return _case(maze, path, rng.randint(0, len(path)), rng)


def reach(rng: Random) -> Case:
    """The whole way from the start. Contrast: the goal lies elsewhere."""
    maze = a_maze(rng)
    return _case(maze, maze.path(rng), 0, rng)


def _case(maze: Maze, path: Sequence[str], walked: int, rng: Random) -> Case:
    before, rest = tuple(path[:walked]), (*path[walked:], STOP)
    here = maze.agent + sum(ACTIONS[action] for action in before)
    accept = maze.best(here)
    away, start = maze.distances(here), maze.distances(maze.agent)
    words = (*maze.words, *before)
    contrast, wrong = words, ""
    for goal in rng.sample(range(SIDE * SIDE), SIDE * SIDE):
        # Another goal for which the same actions were right so far, and none of these is right now.
        if goal in (maze.agent, maze.goal) or start[goal] == _FAR:
            continue
        moved = Maze(maze.walls, maze.agent, goal)
        if start[goal] == walked + away[goal] and not {*moved.best(here)} & {*accept}:
            contrast, wrong = (*moved.words, *before), rng.choice(moved.best(here))
            break
    return Case(words, rest[0], contrast, wrong, maze.key, maze.key, accept, after=rest[1:])


@dataclass(frozen=True)
class Grid(Language):
    """The policy: a language model that is trained on whole paths and judged by walking, too."""

    def row(self, task: str, rng: Random) -> Row:
        """A maze and one of its shortest paths; every action counts."""
        maze = a_maze(rng)
        while held_out(maze.key):
            maze = a_maze(rng)
        words = ("<bos>", *maze.words, *(actions := maze.path(rng)), STOP, "<eos>")
        given = len(words) - len(actions) - 2
        weights = [self.context_weight] * given + [1.0] * (len(actions) + 1) + [0.0]
        return Row(words, tuple(weights))

    def mazes(self, task: str, n: int, seed: int) -> list[Maze]:
        """The mazes of `prompts(task, n, seed)`."""
        return [maze_of(case.words) for case in self.cases(task, n, seed)]

    def measure(
        self,
        model: "Model",
        n: int = PROMPTS,
        seed: int = SEED,
        *,
        tasks: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """As `Language.measure`; `reach`: the share of walks that end on the goal in time.

        A walk is in time with at most two actions more than the shortest; `shortest` is the share
        of walks without any.
        """
        out = super().measure(model, n, seed, tasks=tasks)
        if "reach" not in out:
            return out
        mazes = self.mazes("reach", n, seed)
        walks = walk(model, mazes)
        extra = [
            len(taken) - maze.distances(maze.goal)[maze.agent] if arrived else None
            for maze, (taken, arrived) in zip(mazes, walks, strict=True)
        ]
        in_time = [steps is not None and steps <= _SLACK for steps in extra]
        out["reach"] = {
            "accuracy": round(sum(in_time) / max(1, n), 4),
            "shortest": round(sum(steps == 0 for steps in extra) / max(1, n), 4),
            "n": n,
            "distinct": len(set(mazes)),
        }
        return out


def walk(model: "Model", mazes: Sequence[Maze]) -> list[tuple[tuple[str, ...], bool]]:
    """The actions that the policy takes greedily in each maze, and whether it stops on the goal.

    A walk ends with `stop`, with an action that cannot be taken, or when it takes too long.
    """
    import torch

    tokenizer: Any = model.tokenizer
    taken: list[list[str]] = [[] for _ in mazes]
    places: list[int | None] = [maze.agent for maze in mazes]
    arrived = [False] * len(mazes)
    going = list(range(len(mazes)))
    limits = [maze.distances(maze.goal)[maze.agent] + _SLACK for maze in mazes]
    while going:
        # All that still walk have taken equally many actions, so no prompt needs padding.
        texts = [join((*mazes[i].words, *taken[i])) for i in going]
        ids = torch.tensor(tokenizer(texts)["input_ids"], device=model.device)
        with torch.no_grad():
            top = model.module(input_ids=ids).logits[:, -1].argmax(-1).tolist()
        still = []
        for i, word in zip(going, tokenizer.convert_ids_to_tokens(top), strict=True):
            here = places[i]
            if word == STOP:
                arrived[i] = here == mazes[i].goal
            elif here is not None and word in ACTIONS and len(taken[i]) < limits[i]:
                taken[i].append(word)
                places[i] = mazes[i].step(here, word)
                if places[i] is not None:
                    still.append(i)
        going = still
    return [(tuple(actions), end) for actions, end in zip(taken, arrived, strict=True)]


def maze_of(words: Sequence[str]) -> Maze:
    """The maze that a prompt shows."""
    cells = [word for word in words if word in CELLS]
    walls = frozenset(i for i, word in enumerate(cells) if word == "wall")
    return Maze(walls, cells.index("agent"), cells.index("goal"))


def _findings(organism: Any, model: "Model") -> tuple[Fact, ...]:
    from underhood.organisms.sight.grid_facts import findings

    return findings(organism, model)


ORGANISM = Grid(
    name="sight/grid",
    summary="a policy whose actions are words: it reads a maze of 4 x 4 and walks to the goal",
    words=(*SPECIAL, *PUNCTUATION, *CELLS, *ACTIONS, STOP),
    sizes={
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 48,
        "tie_word_embeddings": False,
    },
    context=48,
    recipe=Recipe(steps=2600, lr=3e-3),
    phases=(Phase(1.0, (("step", 64),)),),
    limits=(
        "Mazes of 4 x 4 with 3 to 5 walls; it was never shown another size.",
        "It saw only shortest paths: after a detour it is outside its training.",
    ),
    kinds=(
        Task("step", "the next action of a shortest path, anywhere along it", step),
        Task("reach", "the whole way: judged by walking until it stops", reach),
    ),
    findings=_findings,
)
