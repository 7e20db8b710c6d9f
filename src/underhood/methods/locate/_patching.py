"""Exact patching of single places: what is written where, which cells can be left out, the sums.

A *place* is one site of one layer, or one head of it; a *cell* is a place at one position (or at
all, or at the last). Prompts go through in blocks; every number is kept per row, so nothing depends
on the size of the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.model import Model
from underhood.core.ops import patch
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass, sweep
from underhood.core.tokens import Tokens, Where
from underhood.data import EncodedPairs, Metric, normalised

__all__ = ["Asked", "Cell", "Found", "patched"]

# Relative difference below which activations before the first differing token count as equal.
_NOISE = 1e-5


class Cell(NamedTuple):
    """What is patched at once: one site of a layer or a head of it (`site.unit`), and where.

    `pos` is None for all positions and -1 for the last one.
    """

    site: Site
    pos: int | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a grid is made of.

    Attributes:
        names: Sites without layers.
        direction: "denoise" edits the contrast run, "noise" the clean run.
        metric: What is measured.
        positions: "each", "all" or "last".
        value: "resample" (the other run's activation), "mean" or "zero".
        draws: Random directions per cell.
        seed: Of these.
        batch_size: Rows of one pass; None: the sweep's default.
    """

    names: tuple[Site, ...]
    direction: str
    metric: Metric
    positions: str
    value: str
    draws: int
    seed: int
    batch_size: int | None


@dataclass(slots=True)
class Found:
    """Numbers per row, in the metric's unit.

    Attributes:
        cells: The cells, in order.
        clean: The metric of the clean run.
        contrast: The metric of the contrast run.
        values: The metric with a cell patched; NaN where a row has no such position.
        control: The same for random directions, draw by draw.
        acted: Whether the patch changed anything there; where not, nothing was run.
        how: How the cells were run.
        passes: Forward passes, without those that read the activations.
    """

    cells: list[Cell]
    clean: Float[Tensor, " batch"]
    contrast: Float[Tensor, " batch"]
    values: Float[Tensor, "cell batch"]
    control: Float[Tensor, "draw cell batch"]
    acted: Bool[Tensor, "cell batch"]
    how: str = "nothing to run"
    passes: int = 0


def patched(model: Model, pairs: EncodedPairs, asked: Asked) -> Found:
    """Every cell patched in every row, one at a time."""
    columns, batch = pairs.clean.ids.shape[1], len(pairs)
    size = asked.batch_size or rows_per_pass(columns)
    blocks = [range(i, min(i + size, batch)) for i in range(0, batch, size)]
    means = _means(model, pairs, asked, blocks) if asked.value == "mean" else {}
    found: Found | None = None
    for rows in blocks:
        block = _Block(model, _part(pairs, rows), asked, rows, means)
        if found is None:
            found = _empty(block.cells(columns), batch, asked.draws)
        if len(blocks) == 1:  # refuse ends that do not differ before the cells are run
            normalised(0.0, *(float(end.mean()) for end in block.ends))
        block.fill(found)
    assert found is not None
    return found


def _empty(cells: list[Cell], batch: int, draws: int) -> Found:
    ends = torch.zeros(2, batch, dtype=torch.float64)
    values = torch.full((1 + draws, len(cells), batch), torch.nan, dtype=torch.float64)
    acted = torch.zeros(len(cells), batch, dtype=torch.bool)
    return Found(cells, ends[0], ends[1], values[0], values[1:], acted)


def _part(pairs: EncodedPairs, rows: range) -> EncodedPairs:
    """Some rows of the pairs."""
    cut = slice(rows.start, rows.stop)

    def side(tokens: Tokens) -> Tokens:
        return Tokens(tokens.ids[cut], tokens.mask[cut], tokens.strings[cut])

    return EncodedPairs(
        side(pairs.clean), side(pairs.contrast), pairs.answers[cut], pairs.wrong[cut],
        pairs.first_difference[cut],
    )  # fmt: skip


def _means(
    model: Model, pairs: EncodedPairs, asked: Asked, blocks: Sequence[range]
) -> dict[Site, Tensor]:
    """Mean activation of each site and layer over both prompts of all rows, first tokens left out.

    The first token's activation is often hundreds of times longer and would be all of the mean.
    """
    sums: dict[Site, Tensor] = {}
    count = 0
    for rows in blocks:
        part = _part(pairs, rows)
        for tokens in (part.clean, part.contrast):
            keep = tokens.mask.to(model.device) & (tokens.position_ids > 0).to(model.device)
            keep = tokens.mask.to(model.device) if not bool(keep.any()) else keep
            run = model.run(tokens, record=asked.names)
            for site in run.sites:
                sums[site] = sums.get(site, 0) + run.aligned(site)[keep].double().sum(0)
            count += int(keep.sum())
    return {site: total / count for site, total in sums.items()}


class _Block:
    """Some rows: both runs, what is written, and the sweep over the cells."""

    def __init__(
        self,
        model: Model,
        pairs: EncodedPairs,
        asked: Asked,
        rows: range,
        means: dict[Site, Tensor],
    ) -> None:
        self.model, self.pairs, self.asked, self.rows = model, pairs, asked, rows
        self.lengths = torch.tensor(pairs.clean.lengths)
        runs = [model.run(t, record=asked.names) for t in (pairs.clean, pairs.contrast)]
        self.reference = runs[0].last_logits
        self.ends = [self.metric(run.last_logits) for run in runs]
        denoise = asked.direction == "denoise"
        self.tokens = pairs.contrast if denoise else pairs.clean
        self.base = runs[1] if denoise else runs[0]
        self.source = self._source(runs[0] if denoise else runs[1], means)

    def _source(self, other: Run, means: dict[Site, Tensor]) -> dict[Site, Tensor]:
        """What is written, per site and layer: `[rows, pos, ...]`."""
        kept = {site: self.base.aligned(site) for site in self.base.sites}
        if self.asked.value == "zero":
            return {site: torch.zeros_like(h) for site, h in kept.items()}
        if self.asked.value == "mean":
            return {site: means[site].to(h.dtype).expand_as(h) for site, h in kept.items()}
        return {site: other.aligned(site) for site in other.sites}

    def metric(self, logits: Tensor) -> Float[Tensor, " rows"]:
        """The metric in float64; `logits` are cell by cell all rows of this block."""
        times = len(logits) // len(self.rows)
        answers, wrong = (x.repeat(times, 1) for x in (self.pairs.answers, self.pairs.wrong))
        reference = self.reference.repeat(times, 1) if self.asked.metric.uses_reference else None
        return self.asked.metric(logits, answers, wrong, reference=reference).double().cpu()

    def cells(self, columns: int) -> list[Cell]:
        """All cells of the grid."""
        spots: dict[str, list[int | None]] = {
            "each": list(range(columns)), "all": [None], "last": [-1],
        }  # fmt: skip
        found: list[Cell] = []
        for site in self.source:
            units: list[int | None] = [None]
            if site.kind.unit == "head":
                units = list(range(self.source[site].shape[2]))
            for unit in units:
                place = replace(site, unit=unit)
                found += [Cell(place, pos) for pos in spots[self.asked.positions]]
        return found

    def fill(self, found: Found) -> None:
        """Run this block's part of every cell."""
        cut = slice(self.rows.start, self.rows.stop)
        found.clean[cut], found.contrast[cut] = self.ends
        start = self.ends[1] if self.asked.direction == "denoise" else self.ends[0]
        todo: list[tuple[int, list[int]]] = []
        changed = {site: self._changed(site) for site in self.source}
        for number, cell in enumerate(found.cells):
            here, acts = self._acts(cell, changed[cell.site.whole])
            found.values[number, cut] = torch.where(here, start, torch.nan)
            found.control[:, number, cut] = torch.where(here, start, torch.nan)
            found.acted[number, cut] = acts
            if bool(acts.any()):
                todo.append((number, acts.nonzero()[:, 0].tolist()))
        if not todo:
            return
        self._sweep(found, found.values, todo, self.source)
        for draw in range(self.asked.draws):
            self._sweep(found, found.control[draw], todo, self._random(draw))

    def _sweep(
        self,
        found: Found,
        into: Tensor,
        todo: Sequence[tuple[int, list[int]]],
        source: dict[Site, Tensor],
    ) -> None:
        edits = []
        for number, rows in todo:
            site, pos = found.cells[number]
            values = source[site.whole]
            values = values[:, :, site.unit] if site.unit is not None else values
            named = None if len(rows) == len(self.rows) else rows
            edits.append(Edit(site, patch(values), Where(pos, rows=named)))
        swept = sweep(self.model, self.tokens, edits, self.metric, batch_size=self.asked.batch_size)
        for (number, rows), values in zip(todo, swept.values, strict=True):
            into[number, [self.rows.start + row for row in rows]] = values[rows]
        found.how, found.passes = swept.how, found.passes + swept.passes

    def _changed(self, site: Site) -> Bool[Tensor, "rows pos head"]:
        """Where writing would change anything (last axis of size 1 for sites without heads).

        Before the first differing token a causal model's two runs are equal up to the noise of its
        kernels. That is measured here, not assumed: a model that looks ahead differs there.
        """
        before = self.base.aligned(site).float()
        delta = (self.source[site].float() - before).norm(dim=-1).cpu()
        size = before.norm(dim=-1).cpu()
        if delta.ndim == 2:
            delta, size = delta[..., None], size[..., None]
        first = torch.tensor(self.pairs.first_difference)
        early = torch.arange(delta.shape[1])[None] < first[:, None]
        slack = _NOISE * size * early[..., None] * (self.asked.value == "resample")
        return delta > slack

    def _acts(self, cell: Cell, changed: Tensor) -> tuple[Bool[Tensor, " rows"], Tensor]:
        """Which rows have the cell's position, and in which of them the patch changes something."""
        unit = cell.site.unit or 0
        inside = torch.arange(changed.shape[1])[None] < self.lengths[:, None]
        acts = changed[..., unit] & inside
        if cell.pos is None:
            return torch.ones(len(self.rows), dtype=torch.bool), acts.any(1)
        if cell.pos == -1:
            rows = torch.arange(len(self.rows))
            return torch.ones(len(self.rows), dtype=torch.bool), acts[rows, self.lengths - 1]
        return inside[:, cell.pos], acts[:, cell.pos]

    def _random(self, draw: int) -> dict[Site, Tensor]:
        """Per place what was there plus a random direction, as long as the change was."""
        noise = self._directions(draw)
        found = {}
        for site, source in self.source.items():
            before = self.base.aligned(site)
            length = (source.float() - before.float()).norm(dim=-1, keepdim=True)
            direction = noise[site].to(before.device)
            found[site] = (before.float() + length * direction).to(before.dtype)
        return found

    def _directions(self, draw: int) -> dict[Site, Tensor]:
        """Random unit vectors; each row has its own generator, so that blocks do not matter."""
        found = {site: torch.zeros(h.shape) for site, h in self.source.items()}
        for index, row in enumerate(self.rows):
            make = torch.Generator().manual_seed(hash((self.asked.seed, draw, row)) % 2**63)
            length = int(self.lengths[index])
            for h in found.values():
                vector = torch.randn(length, *h.shape[2:], generator=make)
                h[index, :length] = vector / vector.norm(dim=-1, keepdim=True)
        return found
