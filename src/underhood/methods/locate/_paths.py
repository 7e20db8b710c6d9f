"""Paths between parts: what a sender's change brings to a receiver, and what that does.

Two passes for each sender (Wang et al. 2022, after the passes that read both runs):

    1. the base run with the sender's activation exchanged and what lies between held (`paths`);
       the receivers' inputs are kept
    2. the base run with these inputs written at the receivers, everything after them free

Where the receiver is the logits, pass 1 is the answer. Pass 2 is a sweep. Every number is kept per
row, so nothing depends on the size of the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.model import Model
from underhood.core.ops import patch
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass, sweep
from underhood.core.tokens import Where
from underhood.data import EncodedPairs, Metric, normalised
from underhood.methods.locate._asked import Found
from underhood.methods.locate._paths_linear import Line

__all__ = ["Asked", "Cell", "Node", "paths"]

# Relative difference below which two activations count as equal: the noise of float32 kernels.
_NOISE = 1e-6
# Numbers of receivers' inputs held at once.
_HELD = 64_000_000


class Node(NamedTuple):
    """A sender or receiver.

    Attributes:
        site: Its address; a head is `site.unit`.
        name: As in circuits: `input`, `a1.h2`, `m1`, `a2.h0<q>`, `logits`.
        order: When it is computed; a sender is upstream of receivers of a higher order.
    """

    site: Site
    name: str
    order: int


class Cell(NamedTuple):
    """A sender's number, and the position at which it is exchanged (None: all, -1: the last)."""

    sender: int
    pos: int | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked; see `path_patching`."""

    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]
    paths: str
    arrival: str
    direction: str
    metric: Metric
    positions: str
    receiver_pos: int | None
    draws: int
    seed: int
    batch_size: int | None

    @property
    def to_logits(self) -> bool:
        """Whether the receiver is the output itself."""
        return self.receivers[0].site.name == "logits"

    def upstream(self, sender: Node) -> bool:
        """Whether a sender comes before any of the receivers."""
        return any(sender.order < receiver.order for receiver in self.receivers)


def paths(model: Model, pairs: EncodedPairs, asked: Asked) -> Found[Cell]:
    """The effect of every sender on the answer by way of the receivers."""
    columns = pairs.clean.ids.shape[1]
    blocks = pairs.blocks(asked.batch_size or rows_per_pass(columns))
    spots: dict[str, list[int | None]] = {"each": [*range(columns)], "all": [None], "last": [-1]}
    cells = [Cell(n, p) for n in range(len(asked.senders)) for p in spots[asked.positions]]
    found = Found.empty(cells, len(pairs), asked.draws)
    for rows in blocks:
        block = _Block(model, pairs.rows(rows), asked, rows)
        if len(blocks) == 1:  # refuse ends that do not differ before the cells are run
            normalised(0.0, *(float(end.mean()) for end in block.ends))
        block.fill(found)
    return found


def _held(model: Model, paths: str) -> list[Site]:
    """Sites that are held at the base run's values while a sender's change travels."""
    if paths == "all":
        return []
    found = []
    for layer in range(model.n_layers):
        # A layer that mixes positions without heads (a scan) is held at what it writes.
        names = [next((n for n in ("z", "attn_out") if model.offers(_at(model, n, layer))), "")]
        names += ["mlp_out"] if paths == "direct" else []
        sites = [_at(model, n, layer) for n in names if n]
        found += [site for site in sites if model.offers(site)]
    return found


def _at(model: Model, name: str, layer: int | None = None) -> Site:
    return Site(name, layer, stack=model.main)


class _Block:
    """Some rows: both runs, what is exchanged, and the passes over the cells."""

    def __init__(self, model: Model, pairs: EncodedPairs, asked: Asked, rows: range) -> None:
        self.model, self.pairs, self.asked, self.rows = model, pairs, asked, rows
        self.lengths = torch.tensor(pairs.clean.lengths)
        self.held = _held(model, asked.paths)
        self.inputs = [receiver.site for receiver in asked.receivers]
        self.sent = sorted({s.site.whole for s in asked.senders if asked.upstream(s)})
        self.line = None
        if asked.arrival == "linear":
            self.line = Line(model, [(r.site, r.order) for r in asked.receivers], self.sent)
        more = self.line.sites if self.line else []
        kept = [*self.held, *self.sent, *more]
        kept += [] if asked.to_logits else [s.whole for s in self.inputs]
        clean, contrast = (
            model.run(t, record=list(dict.fromkeys(kept))) for t in (pairs.clean, pairs.contrast)
        )
        self.reference = clean.last_logits
        self.ends = [self.metric(run.last_logits) for run in (clean, contrast)]
        noise = asked.direction == "noise"
        self.tokens = pairs.clean if noise else pairs.contrast
        self.base, other = (clean, contrast) if noise else (contrast, clean)
        self.start = self.ends[0] if noise else self.ends[1]
        self.source = {site: other.aligned(site) for site in self.sent}
        if self.line:
            self.line.read(self.base, other)

    def metric(self, logits: Tensor) -> Float[Tensor, " rows"]:
        """The metric in float64; `logits` are cell by cell all rows of this block."""
        times = len(logits) // len(self.rows)
        answers, wrong = (x.repeat(times, 1) for x in (self.pairs.answers, self.pairs.wrong))
        reference = self.reference.repeat(times, 1) if self.asked.metric.uses_reference else None
        return self.asked.metric(logits, answers, wrong, reference=reference).double().cpu()

    def fill(self, found: Found[Cell]) -> None:
        """Run this block's part of every cell."""
        cut = slice(self.rows.start, self.rows.stop)
        found.clean[cut], found.contrast[cut] = self.ends
        todo: list[tuple[int, list[int]]] = []
        changed = {site: self._changed(site) for site in self.sent}
        for number, cell in enumerate(found.cells):
            sender = self.asked.senders[cell.sender]
            inside = self._inside(cell.pos)
            found.values[number, cut] = torch.where(inside, self.start, torch.nan)
            found.control[:, number, cut] = torch.where(inside, self.start, torch.nan)
            if self.asked.upstream(sender):
                acts = self._acts(cell, changed[sender.site.whole])
                if bool(acts.any()):
                    todo.append((number, acts.nonzero()[:, 0].tolist()))
        for draw in range(-1, self.asked.draws):
            source = self.source if draw < 0 else self._random(draw)
            into = found.values if draw < 0 else found.control[draw]
            for some in self._slabs(todo):
                self._through(found, into, some, source, mark=draw < 0)

    # Which cells ---------------------------------------------------------------------------------

    def _inside(self, pos: int | None) -> Bool[Tensor, " rows"]:
        """Which rows have a position."""
        return torch.tensor(-1 if pos is None else pos) < self.lengths

    def _changed(self, site: Site) -> Bool[Tensor, "rows pos head"]:
        """Where both runs differ (last axis of size 1 for sites without heads)."""
        before = self.base.aligned(site).float()
        delta = (self.source[site].float() - before).norm(dim=-1).cpu()
        size = before.norm(dim=-1).cpu()
        if delta.ndim == 2:
            delta, size = delta[..., None], size[..., None]
        # Only before the first differing token is a difference sure to be the kernels' noise.
        first = torch.tensor(self.pairs.first_difference)
        early = torch.arange(delta.shape[1])[None] < first[:, None]
        return delta > 10 * _NOISE * size * early[..., None]

    def _acts(self, cell: Cell, changed: Tensor) -> Bool[Tensor, " rows"]:
        """Rows in which the sender's activation differs at the cell's position."""
        unit = self.asked.senders[cell.sender].site.unit or 0
        acts = changed[..., unit] & (torch.arange(changed.shape[1]) < self.lengths[:, None])
        if cell.pos is None:
            return acts.any(1)
        if cell.pos == -1:
            return acts[torch.arange(len(acts)), self.lengths - 1]
        return acts[:, cell.pos]

    def _slabs(self, todo: list[tuple[int, list[int]]]) -> list[list[tuple[int, list[int]]]]:
        """Cells whose receivers' inputs are held at once."""
        if self.asked.to_logits:
            return [todo] if todo else []
        widths = sum(self._kept(self.base.aligned(s.whole), s)[0].numel() for s in self.inputs)
        each = max(1, _HELD // max(1, widths * len(self.rows)))
        return [todo[i : i + each] for i in range(0, len(todo), each)]

    @staticmethod
    def _kept(value: Tensor, site: Site) -> Tensor:
        """A receiver's part of what was recorded: its head, or all."""
        return value if site.unit is None else value[:, :, site.unit]

    # The passes ----------------------------------------------------------------------------------

    def _through(
        self,
        found: Found[Cell],
        into: Tensor,
        todo: Sequence[tuple[int, list[int]]],
        source: dict[Site, Tensor],
        *,
        mark: bool,
    ) -> None:
        """Both passes for some cells; `mark` notes where anything arrived."""
        logits, arrived = self._first(found, todo, source)
        first = self.rows.start
        if self.asked.to_logits:
            values = self.metric(logits).view(len(todo), -1)
            for (number, rows), value in zip(todo, values, strict=True):
                places = [first + row for row in rows]
                into[number, places] = value[rows]
                found.acted[number, places] |= mark
            found.how = "one pass for each sender: the receiver is the output"
            return
        moved = self._arrived(arrived)
        live = [i for i, (_, rows) in enumerate(todo) if bool(moved[i, rows].any())]
        if not live:
            return
        where = Where(self.asked.receiver_pos)
        plans = [Plan([Edit(s, patch(v[i]), where) for s, v in arrived.items()]) for i in live]
        swept = sweep(self.model, self.tokens, plans, self.metric, batch_size=self.asked.batch_size)
        for i, values in zip(live, swept.values, strict=True):
            number, rows = todo[i]
            rows = [row for row in rows if bool(moved[i, row])]
            places = [first + row for row in rows]
            into[number, places] = values[rows]
            found.acted[number, places] |= mark
        found.how, found.passes = swept.how, found.passes + swept.passes

    def _first(
        self, found: Found[Cell], todo: Sequence[tuple[int, list[int]]], source: dict[Site, Tensor]
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """Pass 1: last logits `[cell * row, vocab]`, and receivers' inputs `[cell, row, ...]`."""
        many = len(self.rows)
        columns = self.tokens.ids.shape[1]
        each = max(1, (self.asked.batch_size or rows_per_pass(columns)) // many)
        names = [] if self.asked.to_logits else list(dict.fromkeys(s.whole for s in self.inputs))
        logits: list[Tensor] = []
        kept: dict[Site, list[Tensor]] = {site: [] for site in self.inputs}
        for start in range(0, len(todo), each):
            some = todo[start : start + each]
            edits = [self._hold(site, len(some)) for site in self.held]
            for i, (number, rows) in enumerate(some):
                cell = found.cells[number]
                spots = Where(cell.pos, rows=[i * many + row for row in rows])
                for site, value in self._sent(self.asked.senders[cell.sender], source).items():
                    edits.append(Edit(site, patch(value[rows]), spots))
            run = self.model.run(self.tokens.repeat(len(some)), edits=edits, record=names)
            found.passes += 1
            if self.asked.to_logits:
                logits.append(run.last_logits)
                continue
            for site, parts in kept.items():
                value = self._kept(run.aligned(site.whole), site)
                parts.append(value.unflatten(0, (len(some), many)))
        if self.asked.to_logits:
            return torch.cat(logits), {}
        return torch.empty(0), {site: torch.cat(parts) for site, parts in kept.items()}

    def _hold(self, site: Site, times: int) -> Edit:
        """Hold a site at the base run's values in all rows."""
        value = self.base.aligned(site)
        many = value if len(value) == 1 else value.repeat(times, *[1] * (value.ndim - 1))
        return Edit(site, patch(many))

    def _sent(self, sender: Node, source: dict[Site, Tensor]) -> dict[Site, Tensor]:
        """What is written for a sender in pass 1."""
        value = source[sender.site.whole]
        if self.line:
            delta = value.double() - self.base.aligned(sender.site.whole).double()
            return self.line.written(sender.site, sender.order, delta)
        return {sender.site: self._kept(value, sender.site)}

    def _arrived(self, arrived: dict[Site, Tensor]) -> Bool[Tensor, "cell rows"]:
        """Whether anything arrived at the receivers, at the positions where it is written."""
        spots = torch.arange(self.tokens.ids.shape[1])[None]
        here = spots < self.lengths[:, None]
        if self.asked.receiver_pos is not None:
            pos = self.asked.receiver_pos
            here = (
                spots
                == (self.lengths + pos if pos < 0 else torch.full_like(self.lengths, pos))[:, None]
            )
        found = torch.zeros(())
        for site, value in arrived.items():
            before = self._kept(self.base.aligned(site.whole), site).float()
            delta = (value.float() - before).flatten(3).norm(dim=-1).cpu()
            size = before.flatten(2).norm(dim=-1).cpu()
            found = found + ((delta > _NOISE * size) & here).any(2)
        return found > 0

    # The control ---------------------------------------------------------------------------------

    def _random(self, draw: int) -> dict[Site, Tensor]:
        """Per sender what was there plus a random direction, as long as the change was.

        Each row has its own generator, so that blocks do not matter.
        """
        found = {}
        noise = {site: torch.zeros(h.shape) for site, h in self.source.items()}
        for index, row in enumerate(self.rows):
            make = torch.Generator().manual_seed(hash((self.asked.seed, draw, row)) % 2**63)
            length = int(self.lengths[index])
            for h in noise.values():
                vector = torch.randn(length, *h.shape[2:], generator=make)
                h[index, :length] = vector / vector.norm(dim=-1, keepdim=True)
        for site, source in self.source.items():
            before = self.base.aligned(site)
            length = (source.float() - before.float()).norm(dim=-1, keepdim=True)
            random = before.float() + length * noise[site].to(before.device)
            found[site] = random.to(before.dtype)
        return found
