"""A small compiler: programs over sequences become weights on a board.

A program is a chain of operations on sequences, after RASP (Weiss, 2021): `pick` and `mean` select
positions and bring something from there (a head each), `combine` and `steps` work on one position
(neurons). Every operation gets a space of the stream of its own, one-hot over its values; numbers
take two dimensions, themselves and a constant one. Operations are put into the first layer where
what they read is ready, and whatever is left of the board becomes a distractor.

    >>> program = Program(("a", "b"), context=8)
    >>> back = program.pick("back", program.places, program.places, lambda q, k: 8.0 * (k == q - 1),
    ...                     program.tokens)
    >>> program.output(back)
    >>> board = program.compile()
    >>> sorted(board.compiled())[0], len(board.compiled())
    ('a0.h0->logits', 4)

What this does not do: sequences that hold sets, selections without softmax, or programs whose
attention is not causal: as in the model, a position sees itself and what is before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from underhood.core.errors import UsageError
from underhood.organisms.wired_board import Board, Size

__all__ = ["Op", "Program"]

Value = Any  # anything that can be compared and hashed
_HEADS = 4
_SPARE = 6  # neurons of every MLP, and dimensions of the stream, that are left to distractors
_GAIN = 8.0
_AWAY = -30.0  # score that keeps a mean off <bos>


@dataclass(frozen=True, eq=False)
class Op:
    """A sequence: at every position one of `values` (one-hot), or a number (`values` empty).

    Attributes:
        name: Also the name of its space.
        values: What it can be.
        stage: 0 for the input, 2l+1 for a head of layer l, 2l+2 for its MLP.
        place: Node that computes it, as in `a0.h1`.
    """

    name: str
    values: tuple[Value, ...]
    stage: int
    place: str

    @property
    def size(self) -> int:
        """Dimensions of its space."""
        return len(self.values) or 2


Fill = Callable[[Board], None]


@dataclass
class Program:
    """Operations in the order in which they were written.

    Args:
        words: The vocabulary.
        context: Longest prompt, `<bos>` included.
    """

    words: tuple[str, ...]
    context: int = 12
    _ops: list[Op] = field(default_factory=list)
    _fills: list[Fill] = field(default_factory=list)
    _features: int = 8
    _heads: dict[int, int] = field(default_factory=dict)
    _neurons: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = Op("tok", self.words, 0, "input")
        self.places = Op("pos", tuple(range(self.context)), 0, "input")

    # Operations ----------------------------------------------------------------------------------

    def pick(
        self,
        name: str,
        query: Op | None,
        key: Op,
        score: Callable[[Value, Value], float],
        value: Op,
    ) -> Op:
        """The value at the position whose key scores highest for the query here.

        Args:
            name: Of the result.
            query: What this position asks with; None for a constant (the score gets None).
            key: What the others answer with.
            score: Of a query value and a key value; differences of 6 and more make it sharp.
            value: What is brought.
        """
        op, layer, head = self._head(name, value.values, [query, key, value])

        def fill(board: Board) -> None:
            _look(board, (layer, head), query, key, score)
            board.move(layer, head, {value.name: torch.eye(value.size)}, {name: _eye(op)})

        return self._add(op, fill, key.size)

    def share(
        self, name: str, query: Op, key: Op, match: Callable[[Value, Value], bool], sharp: float
    ) -> Op:
        """`1 / (1 + n)`, where n positions so far match: RASP's selector width.

        Attention is spread over the matching positions and `<bos>`; what it gives to `<bos>` says
        how many there are.
        """
        op, layer, head = self._head(name, (), [query, key])

        def fill(board: Board) -> None:
            _look(board, (layer, head), query, key, lambda q, k: sharp * match(q, k), rest=sharp)
            _carry_number(board, (layer, head), {"bos": torch.ones(1, 1)}, name)

        return self._add(op, fill, key.size + 1)

    def mean(self, name: str, value: Op, weight: Callable[[Value], float]) -> Op:
        """The mean weight of a value over all positions so far, `<bos>` left out."""
        op, layer, head = self._head(name, (), [value])

        def fill(board: Board) -> None:
            board.q_bias[layer, head, 0] = board.size.d_head**0.5
            board.look(layer, head, {}, {"bos": torch.full((1, 1), _AWAY)})
            weights = torch.tensor([[weight(v)] for v in value.values])
            _carry_number(board, (layer, head), {value.name: weights}, name)

        return self._add(op, fill, 1)

    def combine(self, name: str, of: Sequence[Op], function: Callable[..., Value | None]) -> Op:
        """A function of one or two one-hot operations, one neuron for each combination.

        Combinations for which the function gives None leave the result empty.
        """
        cells = [(i, j) for i in range(of[0].size) for j in range(of[1].size if of[1:] else 1)]
        made = {
            (i, j): function(of[0].values[i], *(op.values[j] for op in of[1:])) for i, j in cells
        }
        made = {cell: value for cell, value in made.items() if value is not None}
        values = tuple(dict.fromkeys(made.values()))
        op, layer = self._mlp(name, values, list(of), len(made))

        def fill(board: Board) -> None:
            reads = {o.name: torch.zeros(o.size, len(made)) for o in of}
            out = torch.zeros(len(made), op.size)
            for n, (cell, value) in enumerate(made.items()):
                for o, i in zip(of, cell, strict=False):
                    reads[o.name][i, n] = 2.0
                out[n, values.index(value)] = 1.0
            # Fires only where all inputs are near one: what soft attention leaks stays below.
            board.neurons(layer, reads, {name: out}, bias=1.0 - 2.0 * len(of))

        return self._add(op, fill)

    def steps(
        self, name: str, number: Op, at: Sequence[float], values: Sequence[Value], width: float
    ) -> Op:
        """One of `values`, by how many thresholds a number exceeds.

        Args:
            name: Of the result.
            number: A `mean` or `share`.
            at: Thresholds, ascending.
            values: One more than thresholds; may repeat.
            width: Over which the result changes around a threshold.
        """
        kinds = tuple(dict.fromkeys(values))
        op, layer = self._mlp(name, kinds, [number], 2 * len(at) + 1)

        def fill(board: Board) -> None:
            edges = [t + side * width / 2 for t in at for side in (-1.0, 1.0)]
            reads = torch.zeros(2, len(edges) + 1)
            reads[0, 1:] = 1.0
            out = torch.zeros(len(edges) + 1, op.size)
            out[0, kinds.index(values[0])] = 1.0
            for i, (before, after) in enumerate(zip(values, values[1:], strict=False)):
                for n, sign in ((2 * i + 1, 1.0), (2 * i + 2, -1.0)):
                    out[n, kinds.index(after)] += sign / width
                    out[n, kinds.index(before)] -= sign / width
            bias = torch.tensor([1.0, *(-e for e in edges)])
            board.neurons(layer, {number.name: reads}, {name: out}, bias)

        return self._add(op, fill)

    # Output --------------------------------------------------------------------------------------

    def output(self, op: Op) -> None:
        """Read words' logits from a one-hot operation whose values are words."""
        self._fills.append(lambda board: board.answer(op.name, [str(v) for v in op.values], _GAIN))

    def output_nearest(self, number: Op, centres: dict[str, float], gain: float) -> None:
        """Read the word whose centre is nearest: `gain * (2 c x - c^2)`, linear in the number.

        A constant lifts these words above all others.
        """

        def fill(board: Board) -> None:
            start = board.at(number.name).start
            for word, centre in centres.items():
                board.unembed[start, board.token(word)] = gain * 2 * centre
                board.unembed[start + 1, board.token(word)] = _GAIN - gain * centre**2

        self._fills.append(fill)

    # Compiling -----------------------------------------------------------------------------------

    def compile(self, seed: int = 0) -> Board:
        """The program as weights; what is left over is noise of this seed.

        Raises:
            UsageError: More than four heads would be needed in one layer.
        """
        spaces = {op.name: op.size for op in (self.tokens, self.places, *self._ops)} | {"bos": 1}
        layers = max((op.stage + 1) // 2 for op in self._ops)
        if max(self._heads.values(), default=0) > _HEADS:
            raise UsageError(
                "the program needs too many heads in one layer",
                given=f"{max(self._heads.values())} heads",
                do=f"chain the operations; a layer has {_HEADS}",
            )
        wide = -(-(sum(spaces.values()) + _SPARE) // _HEADS)
        size = Size(
            layers=layers,
            heads=_HEADS,
            d_head=max(self._features, wide, *(op.size for op in self._ops), len(self.words)),
            neurons=max(self._neurons.values(), default=0) + _SPARE,
            context=self.context,
        )
        board = Board("gpt2", self.words, spaces, size)
        board.tell("tok", self.words)
        board.tell("bos", ["<bos>"])
        board.count("pos")
        for fill in self._fills:
            fill(board)
        board.distract(seed)
        return board

    def _head(
        self, name: str, values: tuple[Value, ...], of: Sequence[Op | None]
    ) -> tuple[Op, int, int]:
        layer = (max(op.stage for op in of if op is not None) + 1) // 2
        head = self._heads.get(layer, 0)
        self._heads[layer] = head + 1
        return Op(name, values, 2 * layer + 1, f"a{layer}.h{head}"), layer, head

    def _mlp(
        self, name: str, values: tuple[Value, ...], of: Sequence[Op], neurons: int
    ) -> tuple[Op, int]:
        layer = max(op.stage for op in of) // 2
        self._neurons[layer] = self._neurons.get(layer, 0) + neurons
        return Op(name, values, 2 * layer + 2, f"m{layer}"), layer

    def _add(self, op: Op, fill: Fill, features: int = 0) -> Op:
        self._ops.append(op)
        self._fills.append(fill)
        self._features = max(self._features, features)
        return op


def _eye(op: Op) -> Tensor:
    return torch.eye(op.size)


def _look(
    board: Board,
    place: tuple[int, int],
    query: Op | None,
    key: Op,
    score: Callable[[Value, Value], float],
    *,
    rest: float | None = None,
) -> None:
    """Scores by table; with `rest`, `<bos>` scores as much for every query."""
    layer, head = place
    asked = query.values if query is not None else (None,)
    table = torch.tensor([[float(score(q, k)) for k in key.values] for q in asked])
    keys = {key.name: torch.eye(key.size)}
    if rest is not None:
        table = torch.cat([table, torch.full((len(asked), 1), rest)], 1)
        keys[key.name] = torch.eye(key.size, key.size + 1)
        keys["bos"] = torch.eye(key.size + 1)[-1:]
    if query is None:
        board.q_bias[layer, head, : table.shape[1]] = table[0] * board.size.d_head**0.5
        board.look(layer, head, {}, keys)
    else:
        board.look(layer, head, {query.name: table}, keys)


def _carry_number(
    board: Board, place: tuple[int, int], value: dict[str, Tensor], name: str
) -> None:
    """A weighted mean, and beside it a constant one from the value's bias."""
    layer, head = place
    board.move(layer, head, value, {name: torch.eye(2)})
    board.v_bias[layer, head, 1] = 1.0
