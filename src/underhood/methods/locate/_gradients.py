"""Gradients of the metric at places, and what they estimate about patches.

A forward is run with a *probe* at each place: a tensor of zeros that an ordinary edit adds to the
activation (or, for integrated gradients, the activation itself as a leaf). The metric's gradient at
the probe is its gradient at exactly the place where a patch would write, in every family and under
every attention kernel; nothing is switched, nothing else is held in memory.

    atp     (a_clean - a_contrast) . dm/da at one of the runs, or the mean of both
    ig      (a_clean - a_contrast) . mean over steps of dm/da, while the whole activation of one
            site and layer moves from one run's to the other's in a straight line
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import NotFinite, NotOffered
from underhood.core.model import Model
from underhood.core.ops import add, call, set_to
from underhood.core.run import Run
from underhood.core.site import Site
from underhood.core.tokens import Tokens
from underhood.methods.locate._block import Block
from underhood.methods.locate._places import Place

__all__ = ["Point", "Probe", "Tape", "integrated", "point_of", "probes_of", "slopes"]

Reading = Callable[[Tensor], Tensor]
"""From logits (some times all rows of a block) to the metric, one number per row."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where gradients are taken: one of a block's two runs.

    Attributes:
        tokens: Its prompts.
        clean: Whether it is the clean run.
        forms: What it holds, per place `[rows, pos, unit, width]`.
        others: What the other run holds.
        sign: A change from this run towards the other, times this, is positive where what changes
            supports the answer.
    """

    tokens: Tokens
    clean: bool
    forms: dict[Place, Tensor]
    others: dict[Place, Tensor]

    @property
    def sign(self) -> float:
        """+1 for the contrast run, which patches restore; -1 for the clean run."""
        return -1.0 if self.clean else 1.0


def point_of(block: Block, *, clean: bool) -> Point:
    """A run of a block as a point; the block's patches must exchange the two runs' activations."""
    base = clean != block.asked.denoises
    forms, others = (block.before, block.source) if base else (block.source, block.before)
    return Point(block.pairs.clean if clean else block.pairs.contrast, clean, forms, others)


@dataclass(frozen=True, slots=True)
class Probe:
    """A leaf at a site: added to the activation, or put in its place (`whole`)."""

    site: Site
    leaf: Tensor
    instead: bool = False

    @property
    def edit(self) -> Edit:
        """The edit that puts it there."""
        return Edit(self.site, set_to(self.leaf) if self.instead else add(self.leaf))


def probes_of(
    place: Place, form: Float[Tensor, "rows pos unit width"], like: Tensor
) -> list[Probe]:
    """Probes of zeros for one place; one per unit for experts, and for those only that are chosen.

    Args:
        place: The place.
        form: What the run holds there.
        like: The site's activation, for its axes.
    """
    if not (place.by_slot and place.units is not None):
        return [Probe(place.site, _leaf(like.shape, like))]
    shape = (*form.shape[:2], 1, form.shape[-1])
    chosen = form.abs().amax((0, 1, 3)) > 0
    return [
        Probe(site, _leaf(shape, like))
        for site, there in zip(place.sites, chosen.tolist(), strict=True) if there
    ]  # fmt: skip


def _leaf(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float32, device=like.device, requires_grad=True)


def gathered(
    place: Place, form: Tensor, grads: dict[Site, Tensor]
) -> Float[Tensor, "rows pos unit width"]:
    """Gradients at a place's probes in the place's form; zeros for experts that were not chosen."""
    if not (place.by_slot and place.units is not None):
        return place.split(grads[place.site])
    none = torch.zeros_like(form[:, :, 0], dtype=torch.float32)
    return torch.stack([grads[site][:, :, 0] if site in grads else none for site in place.sites], 2)


class _Gate(torch.autograd.Function):
    """Nothing forward; backward, what a switch says."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, switch: list[float], layer: int) -> Tensor:
        ctx.switch, ctx.layer = switch, layer
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.switch[ctx.layer], None, None


class Tape:
    """One forward with probes; backward through it as often as asked.

    Args:
        model: The model.
        tokens: The prompts.
        probes: Where gradients are wanted.
        read: The metric.
        gates: Put a gate behind what attention and MLP of each layer write, for `drop`.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        probes: Sequence[Probe],
        read: Reading,
        *,
        gates: bool = False,
    ) -> None:
        self.probes = probes
        self.switch = [1.0] * model.n_layers
        edits = [probe.edit for probe in probes] + (self._gates(model) if gates else [])
        run = model.run(tokens, edits=edits, grad=True)
        self.total = read(run.last_logits).sum()

    def _gates(self, model: Model) -> list[Edit]:
        sites = [
            Site(name, layer, stack=model.main)
            for layer in range(model.n_layers)
            for name in ("attn_out", "mlp_out")
        ]

        def gate(layer: int) -> Callable[[Tensor], Tensor]:
            return lambda h: _Gate.apply(h, self.switch, layer)  # type: ignore[return-value]

        return [Edit(site, call(gate(site.layer or 0))) for site in sites if model.offers(site)]

    def back(self, *, drop: int | None = None, last: bool = True) -> dict[Site, Tensor]:
        """Gradients at the probes.

        Args:
            drop: A layer whose writes let no gradient through.
            last: Whether the tape may be forgotten.

        Raises:
            NotOffered: A probe that the metric does not depend on.
            NotFinite: Gradients that are not numbers.
        """
        self.switch[:] = [float(layer != drop) for layer in range(len(self.switch))]
        leaves = [probe.leaf for probe in self.probes]
        grads = torch.autograd.grad(self.total, leaves, retain_graph=not last, allow_unused=True)
        found = {}
        for probe, grad in zip(self.probes, grads, strict=True):
            if grad is None:
                raise NotOffered(
                    f"no gradient comes back to {probe.site}",
                    given=str(probe.site),
                    why="the answer does not depend on it through anything differentiable",
                    do="patch it exactly: activation_patching",
                )
            if not bool(torch.isfinite(grad).all()):
                raise NotFinite(
                    f"the gradient at {probe.site} is not finite",
                    given=f"{int((~torch.isfinite(grad)).sum())} of {grad.numel()} values",
                    do="use float32, or patch exactly: activation_patching",
                )
            found[probe.site] = grad.float()
        return found


def slopes(model: Model, block: Block, point: Point) -> dict[Place, Tensor]:
    """The metric's gradient at every place of a block, `[rows, pos, unit, width]`."""
    probes = {
        place: probes_of(place, form, block.base[place.site]) for place, form in point.forms.items()
    }
    flat = [probe for each in probes.values() for probe in each]
    grads = Tape(model, point.tokens, flat, block.metric).back()
    return {place: gathered(place, form, grads) for place, form in point.forms.items()}


def integrated(
    model: Model, block: Block, point: Point, *, steps: int, rows: int
) -> Iterator[tuple[Place, Tensor]]:
    """The mean gradient of every place along its path, place by place.

    The activation of the whole place moves in a straight line from the point's to the other run's,
    everything before it as in the point's run; steps lie in the middle of equal parts.

    Args:
        model: The model.
        block: The rows.
        point: Where the path starts.
        steps: How many.
        rows: Rows of one pass.
    """
    batch = len(point.tokens)
    each = max(1, rows // batch)
    shares = [(step + 0.5) / steps for step in range(steps)]
    for place, form in point.forms.items():
        total = torch.zeros_like(form, dtype=torch.float32)
        for first in range(0, steps, each):
            some = shares[first : first + each]
            probes = _path(place, block.base, form, point.others[place], some)
            tape = Tape(model, point.tokens.repeat(len(some)), probes, block.metric)
            wide = form.repeat(len(some), 1, 1, 1)
            grads = gathered(place, wide, tape.back()) if probes else torch.zeros_like(wide)
            total += grads.view(len(some), batch, *grads.shape[1:]).sum(0)
        yield place, total / steps


def _path(
    place: Place, like: Run, here: Tensor, there: Tensor, shares: Sequence[float]
) -> list[Probe]:
    """The place's activation at some steps of its path, as leaves."""
    moved = torch.cat([here.float() + share * (there - here).float() for share in shares])
    whole = like[place.site]
    if not (place.by_slot and place.units is not None):
        if place.units is not None and moved.shape[2] < whole.shape[2]:
            raise _partial(place)
        leaf = moved.reshape(len(moved), *whole.shape[1:]).detach().requires_grad_()
        return [Probe(place.site, leaf, instead=True)]
    chosen = here.abs().amax((0, 1, 3)) > 0
    return [
        Probe(site, moved[:, :, unit, None].detach().requires_grad_(), instead=True)
        for unit, site in enumerate(place.sites) if bool(chosen[unit])
    ]  # fmt: skip


def _partial(place: Place) -> NotOffered:
    return NotOffered(
        f"integrated gradients move {place.site} as a whole",
        given=f"{len(place.units or ())} of its units",
        why="completeness would not hold for some of them",
        do="units='each', or method='atp'",
    )
