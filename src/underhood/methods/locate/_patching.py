"""Exact patching of cells: every cell by itself, or sets of them together.

Prompts go through in blocks; every number is kept per row, so nothing depends on the size of the
blocks. What a place and a cell are: `_places`; what is written: `_written`; one block: `_block`.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.model import Model
from underhood.data import EncodedPairs, normalised
from underhood.methods.locate._asked import Asked, Found
from underhood.methods.locate._block import Block, Fixed, Grid
from underhood.methods.locate._places import Cell, cells_of, places_of
from underhood.methods.locate._written import Job, check_structure, means_of, optimal_constants

__all__ = ["Asked", "Cell", "ExactPatching", "Found", "patched"]


def patched(model: Model, pairs: EncodedPairs, asked: Asked) -> Found[Cell]:
    """Every cell patched in every row, one at a time."""
    exact = ExactPatching(model, pairs, asked)
    found = Found.empty(exact.grid.cells, len(pairs), asked.draws)
    for rows, block in exact.blocks():
        if len(rows) == len(pairs):  # refuse ends that do not differ before the cells are run
            normalised(0.0, *(float(end.mean()) for end in block.ends))
        block.fill(found)
    return found


class ExactPatching:
    """The cells of a grid; called with sets of them, it patches each set as one.

    Calling it with sets of cell numbers gives per set the mean change of the metric over the rows
    that have such a position, in the metric's unit, positive where the set supports the answer: the
    `Exact` that `_verify.verify` takes.

    Attributes:
        grid: The places, and the cells in order.
    """

    def __init__(self, model: Model, pairs: EncodedPairs, asked: Asked) -> None:
        self.model, self.pairs, self.asked = model, pairs, asked
        if asked.value == "mean-position":
            check_structure(pairs)
        columns = pairs.clean.ids.shape[1]
        places = places_of(model, asked.names, asked.units, pairs.clean, asked.chosen)
        self.grid = Grid(model, asked, places, cells_of(places, asked.positions, columns))
        self.rows = pairs.blocks(asked.size(columns))
        self._fixed: Fixed | None = None
        self._kept: tuple[range, Block] | None = None

    def blocks(self) -> "Iterator[tuple[range, Block]]":
        """The rows block by block; a single block is kept for the next time."""
        if self._kept is not None:
            yield self._kept
            return
        for rows in self.rows:
            block = Block(self.grid, self.fixed, self.pairs.rows(rows), rows)
            if len(self.rows) == 1:
                self._kept = (rows, block)
            yield rows, block

    @property
    def fixed(self) -> Fixed:
        """What is written that does not depend on the row: means, or learned constants."""
        if self._fixed is None:
            self._fixed = _fixed(self)
        return self._fixed

    def __call__(self, sets: Sequence[Sequence[int]]) -> Float[Tensor, " set"]:
        """The mean change over rows for each set of cells, patched together."""
        moved, _, rows = self._sums(sets)
        return self.asked.sign * moved / rows

    def effects(self, sets: Sequence[Sequence[int]]) -> Float[Tensor, " set"]:
        """The same as a share of the way between the two runs: what grids call `effect`."""
        moved, way, _ = self._sums(sets)
        return moved / way

    def _sums(self, sets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Per set: change of the metric, way to go and number, of the rows that have the cells."""
        found = torch.zeros(3, len(sets), dtype=torch.float64)
        for _, block in self.blocks():
            change, here = block.joint(sets)
            way = (block.ends[0] - block.ends[1]) * self.asked.sign
            found += torch.stack([change.sum(1), (here * way).sum(1), here.sum(1)])
        return found[0], found[1], found[2]


def _fixed(exact: ExactPatching) -> Fixed:
    asked, pairs = exact.asked, exact.pairs
    if asked.value in ("resample", "zero"):
        return Fixed({}, [])
    sides = (
        side
        for rows in exact.rows
        for part in [pairs.rows(rows)]
        for side in (part.clean, part.contrast)
    )
    means = means_of(
        exact.model, exact.grid.places, sides, per_position=asked.value == "mean-position"
    )
    if asked.value != "optimal":
        return Fixed(means, [])
    tokens = pairs.contrast if asked.denoises else pairs.clean
    one = exact.model.run(tokens.row(0), record=[place.site for place in exact.grid.places])
    spots = exact.grid.spots
    likes = {place: one[place.site] for place in exact.grid.places}
    reference = _references(exact) if asked.metric.uses_reference else None

    def shaped(number: int, value: Tensor) -> Tensor:
        place = spots[number][0]
        return place.value(value[None, None], likes[place])

    def metric(logits: Tensor, rows: Sequence[int]) -> Tensor:
        index = torch.tensor(rows)
        near = reference[index] if reference is not None else None
        return asked.metric(logits, pairs.answers[index], pairs.wrong[index], reference=near)

    starts = [means[place][0, unit] for place, unit in spots]
    job = Job(exact.model, tokens, exact.grid.cells, shaped, metric)
    size = max(1, asked.size(tokens.ids.shape[1]))
    return Fixed(means, optimal_constants(job, starts, asked.learning, rows=size))


def _references(exact: ExactPatching) -> Tensor:
    """The clean run's logits, for metrics that compare with them."""
    parts = [exact.model.run(exact.pairs.clean.rows(rows)).last_logits for rows in exact.rows]
    return torch.cat(parts)
