"""Estimates of patching effects for a whole grid: AtP, integrated gradients, AtP*.

All have the numbers and the sign of exact patching: an estimated change of the metric per cell and
row, positive where the cell supports the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.errors import NotFinite, PairError, UsageError
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.data import EncodedPairs, Metric, metric_named
from underhood.methods.locate._asked import Asked, Found
from underhood.methods.locate._block import Block
from underhood.methods.locate._gradients import (
    Point,
    Probe,
    Tape,
    gathered,
    integrated,
    point_of,
    probes_of,
    slopes,
)
from underhood.methods.locate._grids import columns_of, effects
from underhood.methods.locate._patching import ExactPatching
from underhood.methods.locate._places import Cell, Place
from underhood.methods.locate._saturation import KEY, QUERY, Softmax, softmaxes

__all__ = [
    "Estimated", "How", "cell_values", "differentiable", "estimate_columns", "estimated", "runs_at",
]  # fmt: skip

_STREAM = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, slots=True)
class How:
    """How effects are estimated.

    Attributes:
        method: "atp", "atp*" or "ig".
        clean: Which runs gradients are taken at: True for the clean one, False for the contrast;
            estimates at several are averaged.
        steps: Of integrated gradients.
    """

    method: str
    clean: tuple[bool, ...]
    steps: int


@dataclass(slots=True)
class Estimated:
    """Estimates and what they cost.

    Attributes:
        found: The grid; its values are the base run's metric plus the estimated change.
        signed: For "atp*" the estimates with the QK fix and without GradDrop, which keep their
            sign; `[cell, batch]`.
        forwards: Forward passes.
        backwards: Backward passes.
    """

    found: Found[Cell]
    signed: Float[Tensor, "cell batch"] | None
    forwards: int = 0
    backwards: int = 0


def differentiable(name: str) -> Metric:
    """A metric by its name.

    Raises:
        UsageError: It has no gradient.
    """
    metric = metric_named(name)
    if not metric.differentiable:
        raise UsageError(
            f"the metric {name} has no gradient",
            given=f"metric={name!r}",
            why="estimates are sent back from the metric",
            do="use logit_diff or log_prob, or patch exactly: activation_patching",
        )
    return metric


def runs_at(grad_at: str, asked: Asked) -> tuple[bool, ...]:
    """The runs that gradients are taken at, by whether they are the clean one."""
    at = {"clean": (True,), "corrupt": (False,), "both": (True, False)}
    return at.get(grad_at, (not asked.denoises,))


def estimated(
    model: Model, pairs: EncodedPairs, asked: Asked, how: How
) -> tuple[Estimated, ExactPatching]:
    """Every cell's effect in every row, estimated; and what patches the cells exactly."""
    exact = ExactPatching(model, pairs, asked)
    job = Estimated(Found.empty(exact.grid.cells, len(pairs)), None)
    if how.method == "atp*":
        job.signed = torch.full_like(job.found.values, torch.nan)
    for rows, block in exact.blocks():
        cut = slice(rows.start, rows.stop)
        job.found.clean[cut], job.found.contrast[cut] = block.ends
        job.forwards += 2
        parts = [_at(model, block, point_of(block, clean=clean), how, job) for clean in how.clean]
        change = torch.stack([part[0] for part in parts]).mean(0)
        for number in range(len(exact.grid.cells)):
            here, acts = block.acts(number)
            change[number] = torch.where(acts, change[number], 0.0)
            change[number] = torch.where(here, change[number], torch.nan)
            job.found.acted[number, cut] = acts
        job.found.values[:, cut] = block.start + asked.sign * change
        if job.signed is not None:
            signed = torch.stack([part[1] for part in parts]).mean(0)
            quiet = ~job.found.acted[:, cut] & ~change.isnan()
            signed = torch.where(quiet, 0.0, signed)
            job.signed[:, cut] = torch.where(change.isnan(), torch.nan, signed)
    return job, exact


def estimate_columns(job: Estimated, asked: Asked) -> dict[str, Tensor]:
    """The columns of a grid of estimates: with `change` per row, and `signed` for AtP*.

    Raises:
        NotFinite: Some estimates are not numbers.
        PairError: No cell differs between the runs, or the metric is the same at both ends.
    """
    found = job.found
    columns = columns_of(found, asked)
    bad = ~torch.isfinite(columns["raw"])
    if bool(bad.any()):
        raise NotFinite(
            "some estimates are not numbers",
            given=f"{int(bad.sum())} of {len(bad)}, the first at"
            f" {found.cells[int(bad.nonzero()[0])].site}",
            why="an activation or a gradient overflowed",
            do="use float32, or patch exactly: activation_patching",
        )
    if not bool(found.acted.any()):
        raise PairError(
            "no cell holds anything else in the other run",
            given=f"{len(found.cells)} cells",
            why="there is nothing to exchange",
            do="ask for other sites or positions, where the two prompts differ",
        )
    start, end = (found.contrast, found.clean) if asked.denoises else (found.clean, found.contrast)
    columns["change"] = asked.sign * (found.values - start) + 0.0
    if job.signed is not None:
        columns["signed"] = effects(start + asked.sign * job.signed, start, end)[0]
    return columns


def _at(
    model: Model, block: Block, point: Point, how: How, job: Estimated
) -> tuple[Float[Tensor, "cell rows"], Float[Tensor, "cell rows"]]:
    """Estimates at one point: as the method gives them, and signed."""
    if how.method == "atp*":
        return _Star(model, block, point, job).estimates()
    if how.method == "ig":
        size = block.asked.size(point.tokens.ids.shape[1])
        grads = dict(integrated(model, block, point, steps=how.steps, rows=size))
        job.forwards += how.steps * len(grads)
        job.backwards += how.steps * len(grads)
    else:
        grads = slopes(model, block, point)
        job.forwards, job.backwards = job.forwards + 1, job.backwards + 1
    change = cell_values(block, {place: _product(point, place, g) for place, g in grads.items()})
    return change, change


def _product(point: Point, place: Place, grad: Tensor) -> Float[Tensor, "rows pos unit"]:
    """The gradient along the way from the point's activation to the other run's."""
    delta = point.others[place].double() - point.forms[place].double()
    return point.sign * (delta * grad.double()).sum(-1)


def cell_values(
    block: Block, maps: dict[Place, Float[Tensor, "rows pos unit"]]
) -> Float[Tensor, "cell rows"]:
    """One number per cell and row, from numbers per position: that one, the last, or their sum."""
    inside = torch.arange(block.pairs.clean.ids.shape[1])[None] < block.lengths[:, None]
    found = torch.zeros(len(block.cells), len(block.rows), dtype=torch.float64)
    rows = torch.arange(len(block.rows))
    maps = {place: torch.where(inside[..., None], m.cpu(), 0.0) for place, m in maps.items()}
    for number, (place, unit) in enumerate(block.grid.spots):
        values, pos = maps[place][..., unit], block.cells[number].pos
        if pos is None:
            found[number] = values.sum(1)
        else:
            found[number] = values[rows, block.lengths - 1] if pos < 0 else values[:, pos]
    return found


class _Star:
    """AtP* at one point: the QK fix where it applies, then GradDrop."""

    def __init__(self, model: Model, block: Block, point: Point, job: Estimated) -> None:
        self.model, self.block, self.point, self.job = model, block, point, job
        places = block.grid.places
        self.fixed = [p for p in places if p.site.name in (*QUERY, *KEY)]
        self.plain = [p for p in places if p not in self.fixed]
        other = block.pairs.contrast if point.clean else block.pairs.clean
        sites = [place.site for place in self.fixed]
        self.softmax: dict[Site, Softmax] = {}
        if sites:
            self.softmax = softmaxes(model, point.tokens, other, sites)
            job.forwards += 2
        self.joint = block.asked.positions == "all"

    def _probes(self) -> list[Probe]:
        found: list[Probe] = []
        for place in self.plain:
            like = self.block.base[place.site]
            found += probes_of(place, self.point.forms[place], like)
        known = {probe.site for probe in found}
        for site in self._z_sites() - known:
            values = self.softmax[self._site_of[site]].values
            leaf = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
            found.append(Probe(site, leaf.requires_grad_()))
        return found

    def _z_sites(self) -> set[Site]:
        self._site_of = {
            Site("z", place.site.layer, stack=place.site.stack): place.site for place in self.fixed
        }
        return set(self._site_of)

    def estimates(self) -> tuple[Float[Tensor, "cell rows"], Float[Tensor, "cell rows"]]:
        """Unsigned (mean over dropped layers of the size), and signed (nothing dropped)."""
        tape = Tape(self.model, self.point.tokens, self._probes(), self.block.metric, gates=True)
        layers = self.model.n_layers
        signed = self._from(tape.back(last=False))
        total = torch.zeros_like(signed)
        for layer in range(layers):
            total += self._from(tape.back(drop=layer, last=layer == layers - 1)).abs()
        self.job.forwards, self.job.backwards = (
            self.job.forwards + 1,
            self.job.backwards + layers + 1,
        )
        return total / self._passes(layers)[:, None], signed

    def _passes(self, layers: int) -> Tensor:
        """Per cell in how many of the passes it is not itself among what is dropped."""
        own = [place.site.name not in _STREAM for place, _ in self.block.grid.spots]
        return torch.tensor([max(layers - int(inner), 1) for inner in own])

    def _from(self, grads: dict[Site, Tensor]) -> Float[Tensor, "cell rows"]:
        maps = {
            place: _product(self.point, place, gathered(place, self.point.forms[place], grads))
            for place in self.plain
        }
        for place in self.fixed:
            z = grads[Site("z", place.site.layer, stack=place.site.stack)]
            maps[place] = self.point.sign * self._moves(place, z)
        return cell_values(self.block, maps)

    def _moves(self, place: Place, z: Tensor) -> Float[Tensor, "rows pos unit"]:
        softmax = self.softmax[place.site]
        if place.site.name in QUERY:
            moves = softmax.query_moves(z)
        else:
            heads = self.block.base[place.site].shape[2]
            moves = softmax.key_moves(z, heads, joint=self.joint)
        return _of_units(moves, place.units)


def _of_units(moves: Tensor, units: Sequence[int] | None) -> Tensor:
    return moves.sum(-1, keepdim=True) if units is None else moves[..., list(units)]
