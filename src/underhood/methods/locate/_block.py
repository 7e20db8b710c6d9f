"""Some rows of a grid of patches: both runs, what is written, and the sweep over the cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.model import Model
from underhood.core.ops import add, patch
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.sweep import Swept, sweep
from underhood.core.tokens import Where
from underhood.data import EncodedPairs
from underhood.methods.locate._asked import Asked, Found
from underhood.methods.locate._places import Cell, Place

__all__ = ["Block", "Fixed", "Grid"]

# Relative difference below which activations before the first differing token count as equal.
_NOISE = 1e-5

# Edits of one sweep at most, where each may hold a tensor of its own.
_HEAVY = 4096


@dataclass(frozen=True)
class Grid:
    """The cells of a grid, and where they lie."""

    model: Model
    asked: Asked
    places: list[Place]
    cells: list[Cell]

    @cached_property
    def spots(self) -> list[tuple[Place, int]]:
        """Per cell its place and the number of its unit in it."""
        each = len(self.cells) // max(sum(len(p.sites) for p in self.places), 1)
        return [(p, unit) for p in self.places for unit in range(len(p.sites)) for _ in range(each)]


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is written that does not depend on the row: means, or learned constants by cell."""

    means: dict[Place, Tensor]
    constants: list[Tensor]


class Block:
    """Some rows: both runs, what is written, and the sweep over the cells."""

    def __init__(self, grid: Grid, fixed: Fixed, pairs: EncodedPairs, rows: range) -> None:
        self.grid, self.fixed, self.pairs, self.rows = grid, fixed, pairs, rows
        self.model, self.asked, self.cells = grid.model, grid.asked, grid.cells
        self.lengths = torch.tensor(pairs.clean.lengths)
        wanted = list(dict.fromkeys(s for place in grid.places for s in place.recorded))
        runs = [self.model.run(t, record=wanted) for t in (pairs.clean, pairs.contrast)]
        self.reference = runs[0].last_logits
        self.ends = [self.metric(run.last_logits) for run in runs]
        self.tokens = pairs.contrast if self.asked.denoises else pairs.clean
        self.base = runs[1] if self.asked.denoises else runs[0]
        self.before = {place: place.read(self.base) for place in grid.places}
        self.source = self._source(runs[0] if self.asked.denoises else runs[1])
        self.changed = {place: self._changed(place) for place in grid.places}

    @property
    def start(self) -> Tensor:
        """The metric of the run that is edited."""
        return self.ends[1] if self.asked.denoises else self.ends[0]

    def _source(self, other: Run) -> dict[Place, Tensor]:
        """What is written, per place: `[rows, pos, unit, width]`; constants are kept by cell."""
        if self.asked.value == "zero":
            return {place: torch.zeros_like(h) for place, h in self.before.items()}
        if self.asked.value == "resample":
            return {place: place.read(other) for place in self.before}
        means = self.fixed.means
        return {
            place: means[place][:, : h.shape[1]].to(h.dtype).expand_as(h)
            for place, h in self.before.items()
        }

    def metric(
        self, logits: Tensor, columns: Int[Tensor, " column"] | None = None
    ) -> Float[Tensor, " rows"]:
        """The metric in float64; `logits` are cell by cell all rows of this block.

        With `columns` they hold these columns of the vocabulary only.
        """
        times = len(logits) // len(self.rows)
        answers, wrong = (x.repeat(times, 1) for x in (self.pairs.answers, self.pairs.wrong))
        answers, wrong = self.asked.metric.numbered(columns, answers, wrong)
        reference = self.reference.repeat(times, 1) if self.asked.metric.uses_reference else None
        return self.asked.metric(logits, answers, wrong, reference=reference).double().cpu()

    # One cell ------------------------------------------------------------------------------------

    def _written(self, number: int) -> Float[Tensor, "rows pos width"]:
        """What is written into a cell, at every position."""
        place, unit = self.grid.spots[number]
        if self.asked.value == "optimal":
            constant = self.fixed.constants[number]
            return constant.to(self.before[place].dtype).expand_as(self.before[place][:, :, unit])
        return self.source[place][:, :, unit]

    def _edit(self, number: int, rows: list[int] | None) -> Edit:
        place, _ = self.grid.spots[number]
        site, pos = self.cells[number]
        value = place.value(self._written(number), self.base[place.site])
        return Edit(site, patch(value), Where(pos, rows=rows))

    def _random(self, number: int, rows: list[int] | None, noise: dict[Place, Tensor]) -> Edit:
        """What was there plus a random direction, as long as the change was.

        A single number has no direction but its sign: there the direction is one of the site's.
        """
        place, unit = self.grid.spots[number]
        site, pos = self.cells[number]
        before = self.before[place][:, :, unit]
        length = (self._written(number).float() - before.float()).norm(dim=-1, keepdim=True)
        if before.shape[-1] > 1 or place.units is None:
            new = (before.float() + length * noise[place][:, :, unit]).to(before.dtype)
            value = place.value(new, self.base[place.site])
            return Edit(site, patch(value), Where(pos, rows=rows))
        moved = length * noise[place]
        if pos is not None:
            spot = self.lengths - 1 if pos < 0 else torch.full_like(self.lengths, pos)
            moved = moved[torch.arange(len(moved)), spot.clamp(max=moved.shape[1] - 1)][:, None]
        return Edit(place.site, add(moved.to(before.dtype)), Where(pos, rows=rows))

    def _changed(self, place: Place) -> Bool[Tensor, "rows pos unit"]:
        """Where writing would change anything.

        Before the first differing token a causal model's two runs are equal up to the noise of its
        kernels. That is measured here, not assumed: a model that looks ahead differs there. Experts
        that were not chosen hold nothing that could be exchanged.
        """
        before = self.before[place].float()
        size = before.norm(dim=-1).cpu()
        there = size > 0 if place.by_slot else torch.ones_like(size, dtype=torch.bool)
        if self.asked.value == "optimal":
            return there
        delta = (self.source[place].float() - before).norm(dim=-1).cpu()
        first = torch.tensor(self.pairs.first_difference)
        early = torch.arange(delta.shape[1])[None] < first[:, None]
        # A single number can be near zero by chance: its site's size says what noise is.
        scale = size if before.shape[-1] > 1 else self._site_size(place)
        slack = _NOISE * scale * early[..., None] * (self.asked.value == "resample")
        return (delta > slack) & there

    def _site_size(self, place: Place) -> Float[Tensor, "rows pos 1"]:
        whole = self.base.aligned(place.site).float().flatten(2)
        return whole.pow(2).mean(-1, keepdim=True).sqrt().cpu()

    def acts(self, number: int) -> tuple[Bool[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """Which rows have the cell's position, and in which of them the patch changes something."""
        place, unit = self.grid.spots[number]
        pos, changed = self.cells[number].pos, self.changed[place][..., unit]
        inside = torch.arange(changed.shape[1])[None] < self.lengths[:, None]
        acts = changed & inside
        everywhere = torch.ones(len(self.rows), dtype=torch.bool)
        if pos is None:
            return everywhere, acts.any(1)
        if pos == -1:
            return everywhere, acts[torch.arange(len(self.rows)), self.lengths - 1]
        return inside[:, pos], acts[:, pos]

    # All cells -----------------------------------------------------------------------------------

    def fill(self, found: Found[Cell]) -> None:
        """Run this block's part of every cell."""
        cut = slice(self.rows.start, self.rows.stop)
        found.clean[cut], found.contrast[cut] = self.ends
        todo: list[tuple[int, list[int]]] = []
        for number in range(len(found.cells)):
            here, acts = self.acts(number)
            found.values[number, cut] = torch.where(here, self.start, torch.nan)
            found.control[:, number, cut] = torch.where(here, self.start, torch.nan)
            found.acted[number, cut] = acts
            if bool(acts.any()):
                todo.append((number, acts.nonzero()[:, 0].tolist()))
        for first in range(0, len(todo), _HEAVY):
            part = todo[first : first + _HEAVY]
            self._sweep(found, found.values, part, None)
            for draw in range(self.asked.draws):
                self._sweep(found, found.control[draw], part, self._directions(draw))

    def _sweep(
        self,
        found: Found[Cell],
        into: Tensor,
        todo: Sequence[tuple[int, list[int]]],
        noise: dict[Place, Tensor] | None,
    ) -> None:
        edits = []
        for number, rows in todo:
            named = None if len(rows) == len(self.rows) else rows
            edits.append(
                self._edit(number, named) if noise is None else self._random(number, named, noise)
            )
        swept = self._run(edits)
        for (number, rows), values in zip(todo, swept.values, strict=True):
            into[number, [self.rows.start + row for row in rows]] = values[rows]
        found.how, found.passes = swept.how, found.passes + swept.passes

    def _run(self, cells: Sequence[Edit | Plan]) -> Swept:
        """A sweep that computes only the logits which the metric reads."""
        columns = self.asked.metric.needs_columns(self.pairs.answers, self.pairs.wrong)
        return sweep(
            self.model, self.tokens, cells, partial(self.metric, columns=columns),
            columns=columns, batch_size=self.asked.batch_size,
        )  # fmt: skip

    def _directions(self, draw: int) -> dict[Place, Tensor]:
        """Random unit vectors; each row has its own generator, so that blocks do not matter."""
        found = {}
        for place, h in self.before.items():
            single = place.units is not None and h.shape[-1] == 1
            shape = self.base[place.site].shape[2:] if single else h.shape[2:]
            found[place] = torch.zeros(*h.shape[:2], *shape, device=h.device)
        for index, row in enumerate(self.rows):
            make = torch.Generator().manual_seed(hash((self.asked.seed, draw, row)) % 2**63)
            length = int(self.lengths[index])
            for h in found.values():
                vector = torch.randn(length, *h.shape[2:], generator=make)
                h[index, :length] = (vector / vector.norm(dim=-1, keepdim=True)).to(h.device)
        return found

    # Sets of cells -------------------------------------------------------------------------------

    def joint(
        self, sets: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "set rows"], Bool[Tensor, "set rows"]]:
        """Change of the metric with each set's cells patched at once, and which rows have any."""
        change = torch.zeros(len(sets), len(self.rows), dtype=torch.float64)
        there = torch.zeros(len(sets), len(self.rows), dtype=torch.bool)
        plans, numbers = [], []
        for index, cells in enumerate(sets):
            if not cells:  # nothing is patched, everywhere
                there[index] = True
                continue
            here, acts = (torch.stack(x).any(0) for x in zip(*map(self.acts, cells), strict=True))
            there[index] = here
            if bool(acts.any()):
                plans.append(self._plan(cells))
                numbers.append(index)
        for first in range(0, len(plans), _HEAVY):
            part = slice(first, first + _HEAVY)
            change[numbers[part]] = self._run(plans[part]).values - self.start
        return change * there, there

    def _plan(self, cells: Sequence[int]) -> Plan:
        """The edits of a set: positions of one unit that the same rows have go together."""
        if self.asked.value == "optimal":
            kept = [(n, self.acts(n)[1].nonzero()[:, 0].tolist()) for n in cells]
            return Plan([self._edit(n, rows) for n, rows in kept if rows])
        together: dict[tuple[Site, tuple[int, ...]], list[int]] = {}
        for number in cells:
            _, acts = self.acts(number)
            rows = tuple(acts.nonzero()[:, 0].tolist())
            if rows:
                together.setdefault((self.cells[number].site, rows), []).append(number)
        edits = []
        for (site, rows), members in together.items():
            spots = [self.cells[n].pos for n in members]
            first = self._edit(members[0], list(rows))
            pos = None if None in spots else [p for p in spots if p is not None]
            edits.append(Edit(site, first.op, Where(pos, rows=rows)))
        return Plan(edits)
