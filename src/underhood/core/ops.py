"""Ops: what an edit does to an activation, as data.

Each op is a small frozen dataclass with one method, `apply(h, moment)`, out of place, so gradients
flow through it. `h` is the site's tensor in its canonical axes (without the unit axis when the
site names a unit). Tensor fields are saved to safetensors, everything else to JSON.

`Moment` tells an op where in the prompts it stands; only `patch`, `swap_subspace`, `attend` and
`call(..., slots=True)` look at it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.errors import EditNeverFired, OutOfRange, ShapeMismatch, UsageError
from underhood.core.site import Site

if TYPE_CHECKING:
    from underhood.core.run import Run

__all__ = [
    "OPS", "Moment", "Op", "add", "affine", "attend", "call", "clamp_feature", "mean", "patch",
    "project_out", "route", "scale", "set_to", "swap_subspace", "zero",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moment:
    """Where an op is applied.

    Attributes:
        positions: Position of each column of this pass within its row's own tokens.
        pos_axis: The axis of `h` that runs over those columns.
        key_offset: Left padding per row, for ops that name key positions.
        slots: At expert sites, the number of the expert in each slot.
    """

    positions: Int[Tensor, "batch pos"]
    pos_axis: int
    key_offset: Int[Tensor, " batch"] | None = None
    slots: Int[Tensor, "batch pos slot"] | None = None


@dataclass(frozen=True)
class Op:
    """Base of all ops. `name` is the word used in plan files.

    `per_row` names the tensor fields that may hold one entry per row of the batch.
    """

    name: ClassVar[str] = ""
    only_on: ClassVar[tuple[str, ...]] = ()
    per_row: ClassVar[tuple[str, ...]] = ()

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        """The activation after the op, same shape as `h`; `h` itself is left alone."""
        raise UsageError("this op has no effect of its own", given=self.name, do="use a named op")

    def bind(self, site: Site) -> "Op":
        """The same op made concrete for a site (recordings are looked up here)."""
        return self

    def of_rows(self, rows: Int[Tensor, " n"], batch: int, ndim: int) -> "Op":
        """The same op for some rows of a batch, when it is applied to those rows alone.

        Fields that hold one entry per row of the whole batch are cut; others stay.

        Args:
            rows: Row numbers in the whole batch.
            batch: Rows of the whole batch.
            ndim: Axes of the activation.
        """
        held = {name: getattr(self, name) for name in self.per_row}
        cut = {k: v for k, v in held.items() if v.ndim == ndim and v.shape[0] == batch > 1}
        return replace(self, **{k: v[rows.to(v.device)] for k, v in cut.items()}) if cut else self

    @property
    def width(self) -> int | None:
        """Size of the site's last axis that the op needs, or None for any."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Tensor fields by name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}


def _float(value: Any, what: str) -> Tensor:
    """`value` as a floating tensor; integers given as Python numbers are fine, int tensors not."""
    tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32)
    if not tensor.is_floating_point():
        raise ShapeMismatch(
            f"{what} must be floating point",
            given=f"a tensor of {tensor.dtype}",
            do="call .float() on it",
        )
    return tensor.detach() if not tensor.requires_grad else tensor


def like(value: Tensor, h: Tensor) -> Tensor:
    """`value` in the precision of `h`; another device is refused, not moved to on the quiet."""
    if value.device != h.device:
        raise ShapeMismatch(
            "the edit's tensor lies on another device than the activation",
            given=f"{value.device} against {h.device}",
            do=f"call plan.to({str(h.device)!r})",
        )
    return value.to(h.dtype)


@dataclass(frozen=True)
class Zero(Op):
    """Zero ablation."""

    name = "zero"

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        return torch.zeros_like(h)


@dataclass(frozen=True, eq=False)
class Set(Op):
    """Put a constant there: one value for all positions."""

    name = "set"
    per_row = ("value",)
    value: Tensor

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        try:
            return like(self.value, h).expand_as(h)
        except RuntimeError:
            raise ShapeMismatch(
                "the value does not fit the activation",
                given=f"shape {tuple(self.value.shape)}",
                why=f"the activation has shape {tuple(h.shape)}",
                do="give a value whose last axes equal the site's",
            ) from None

    @property
    def width(self) -> int | None:
        return self.value.shape[-1] if self.value.ndim else None


@dataclass(frozen=True, eq=False)
class Mean(Set):
    """Mean ablation: a `Set` whose value is a mean over data."""

    name = "mean"


@dataclass(frozen=True, eq=False)
class Patch(Op):
    """Put there what another run had at the same position of the same row.

    Attributes:
        values: `[rows or 1, pos, ...]`, counted in each row's own positions. Rows are those of the
            batch, or those that the edit's `where.rows` names.
    """

    name = "patch"
    per_row = ("values",)
    values: Tensor

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        return _aligned(self.values, h, moment)

    @property
    def width(self) -> int | None:
        return self.values.shape[-1]


def _aligned(values: Tensor, h: Tensor, moment: Moment) -> Tensor:
    """`values` gathered so that each column of `h` meets its own position; `h` beyond their end."""
    batch, length = moment.positions.shape
    if values.shape[0] not in (1, batch):
        raise ShapeMismatch(
            "the recording has another number of rows than the batch",
            given=f"{values.shape[0]} recorded, {batch} in the batch",
            do="record one row, or as many as the batch has",
        )
    source = like(values, h).expand(batch, *values.shape[1:])
    axis = moment.pos_axis
    if axis != 1:  # pattern and scores: [batch head query key]
        source = source.transpose(1, axis)
    index = moment.positions.clamp(0, source.shape[1] - 1)
    rows = torch.arange(batch, device=h.device)[:, None]
    taken = source[rows, index]
    if axis != 1:
        taken = taken.transpose(1, axis)
    if taken.shape != h.shape:
        raise ShapeMismatch(
            "the recording does not fit the activation",
            given=f"shape {tuple(taken.shape)}",
            why=f"the activation has shape {tuple(h.shape)}",
            do="record it on a prompt of the same length, at the same site",
        )
    inside = (moment.positions >= 0) & (moment.positions < source.shape[1])
    shape = [1] * h.ndim
    shape[0], shape[axis] = batch, length
    return torch.where(inside.view(shape), taken, h)


@dataclass(frozen=True, eq=False)
class PatchRun(Op):
    """A patch that has not met its site yet: `bind` looks the site up in the run."""

    name = "patch"
    run: Any

    def bind(self, site: Site) -> Op:
        return Patch(self.run.aligned(site))


@dataclass(frozen=True, eq=False)
class Add(Op):
    """Add a vector (steering). The edit's unit says what a strength of 1 means."""

    name = "add"
    per_row = ("vector",)
    vector: Tensor

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        return h + like(self.vector, h)

    @property
    def width(self) -> int | None:
        return self.vector.shape[-1]


@dataclass(frozen=True)
class Scale(Op):
    """Multiply."""

    name = "scale"
    factor: float

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        return h * self.factor


@dataclass(frozen=True, eq=False)
class ProjectOut(Op):
    """Remove the part of `h` that lies in a subspace (rows of `basis`, orthonormal)."""

    name = "project_out"
    basis: Float[Tensor, "k d"]

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        basis = like(self.basis, h)
        return h - (h @ basis.T) @ basis

    @property
    def width(self) -> int | None:
        return self.basis.shape[-1]


@dataclass(frozen=True, eq=False)
class SwapSubspace(Op):
    """Replace the part of `h` that lies in a subspace by another run's part (DAS, interchange)."""

    name = "swap_subspace"
    per_row = ("values",)
    basis: Float[Tensor, "k d"]
    values: Tensor

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        basis = like(self.basis, h)
        delta = _aligned(self.values, h, moment) - h
        return h + (delta @ basis.T) @ basis

    @property
    def width(self) -> int | None:
        return self.basis.shape[-1]


@dataclass(frozen=True, eq=False)
class SwapSubspaceRun(Op):
    """A subspace swap that has not met its site yet."""

    name = "swap_subspace"
    basis: Tensor
    run: Any

    def bind(self, site: Site) -> Op:
        return SwapSubspace(self.basis, self.run.aligned(site))


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """`h * weight + bias` for a vector weight, `h @ weight + bias` for a matrix."""

    name = "affine"
    weight: Tensor
    bias: Tensor

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        weight = like(self.weight, h)
        moved = h @ weight if weight.ndim == 2 else h * weight
        return moved + like(self.bias, h)

    @property
    def width(self) -> int | None:
        return self.weight.shape[0]


@dataclass(frozen=True, eq=False)
class ClampFeature(Op):
    """Set a dictionary feature: its activation is read by `encoder`, written along `decoder`.

    `a = relu(h @ encoder + bias)`; `h + (value - a) * decoder`. What the dictionary does not
    explain of `h` stays as it is.
    """

    name = "clamp_feature"
    encoder: Float[Tensor, " d"]
    decoder: Float[Tensor, " d"]
    bias: float
    value: float

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        now = torch.relu(h @ like(self.encoder, h) + self.bias)
        return h + (self.value - now)[..., None] * like(self.decoder, h)

    @property
    def width(self) -> int | None:
        return self.decoder.shape[-1]


@dataclass(frozen=True)
class Route(Op):
    """Forbid, force or reweight experts, before the router chooses (site `router_logits`)."""

    name = "route"
    only_on = ("router_logits",)
    forbid: tuple[int, ...] = ()
    force: tuple[int, ...] = ()
    shift: tuple[tuple[int, float], ...] = ()

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        count = h.shape[-1]
        named = (*self.forbid, *self.force, *(e for e, _ in self.shift))
        for expert in named:
            if not 0 <= expert < count:
                raise ShapeMismatch(
                    f"there is no expert {expert}", given=f"{count} experts", do="count from 0"
                )
        out = h.clone()
        out[..., list(self.forbid)] = -torch.inf
        # Far above every other logit, and finite, so that several forced experts share equally.
        top = h.amax(-1, keepdim=True) + 30.0
        out[..., list(self.force)] = top.expand(*h.shape[:-1], len(self.force))
        for expert, amount in self.shift:
            out[..., expert] = out[..., expert] + amount
        return out


@dataclass(frozen=True)
class Attend(Op):
    """Choose what queries may look at, before the softmax (site `scores`).

    Attributes:
        block: Key positions that are made invisible.
        only: If given, the only key positions left visible (of those that were).
    """

    name = "attend"
    only_on = ("scores", "cross_scores")
    block: tuple[int, ...] = ()
    only: tuple[int, ...] | None = None

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        keys = torch.arange(h.shape[-1], device=h.device).expand(h.shape[0], -1)
        if moment.key_offset is not None:
            keys = keys - moment.key_offset.to(h.device)[:, None]
        hidden = torch.isin(keys, torch.tensor(self.block, device=h.device))
        if self.only is not None:
            hidden |= ~torch.isin(keys, torch.tensor(self.only, device=h.device))
        shape = (h.shape[0], *[1] * (h.ndim - 2), h.shape[-1])
        out = h.masked_fill(hidden.view(shape), -torch.inf)
        # A query that would see nothing keeps its row: a softmax over nothing is not a number.
        empty = torch.isneginf(out).all(-1, keepdim=True)
        if bool(empty.all()):
            raise EditNeverFired(
                "blocking these keys leaves no query anything to look at",
                given=f"block={self.block}, only={self.only}",
                do="leave at least one earlier position visible",
            )
        return torch.where(empty, h, out)


@dataclass(frozen=True, eq=False)
class Call(Op):
    """Any function of the activation. Not saved to files."""

    name = "call"
    function: Callable[..., Tensor]

    def apply(self, h: Tensor, moment: Moment) -> Tensor:
        out = self.made(h, moment)
        if not isinstance(out, Tensor) or out.shape != h.shape:
            raise ShapeMismatch(
                "the function must return a tensor of the activation's shape",
                given=str(tuple(out.shape)) if isinstance(out, Tensor) else type(out).__name__,
                why=f"the activation has shape {tuple(h.shape)}",
                do="return the changed activation",
            )
        return out

    def made(self, h: Tensor, moment: Moment) -> Tensor:
        """What the function returns."""
        return self.function(h)


@dataclass(frozen=True, eq=False)
class CallSlots(Call):
    """Any function of the experts' activations and of the numbers of the experts."""

    only_on = ("expert_out", "expert_post")

    def made(self, h: Tensor, moment: Moment) -> Tensor:
        return self.function(h, moment.slots)


OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        Zero, Set, Mean, Patch, Add, Scale, ProjectOut, SwapSubspace, Affine, ClampFeature, Route,
        Attend,
    )
}  # fmt: skip


def zero() -> Op:
    """Zero ablation. Off-distribution: prefer `mean` or `patch` for a causal claim."""
    return Zero()


def set_to(value: Any) -> Op:
    """Put a constant there (`uh.set`)."""
    return Set(_float(value, "a value"))


def mean(value: Any) -> Op:
    """Mean ablation with a mean that you measured, e.g. `run["z.9.6"].mean((0, 1))`."""
    return Mean(_float(value, "a mean"))


def patch(source: "Run | Tensor") -> Op:
    """Put there what another run had: a `Run` that recorded the site, or `[rows, pos, ...]`."""
    return Patch(_float(source, "a patch")) if isinstance(source, Tensor) else PatchRun(source)


def add(vector: Any) -> Op:
    """Add a vector of the site's width."""
    return Add(_float(vector, "a vector"))


def scale(factor: float) -> Op:
    """Multiply by a number."""
    return Scale(float(factor))


def _basis(directions: Any) -> Tensor:
    """Orthonormal rows that span the given directions."""
    rows = _float(directions, "a direction")
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise ShapeMismatch(
            "directions are one vector or a list of vectors",
            given=f"shape {tuple(rows.shape)}",
            do="give [d] or [k, d]",
        )
    q, r = torch.linalg.qr(rows.double().T)
    # What is new in each direction, as a share of its length; float32 rounding leaves 1e-7.
    fresh = r.diagonal().abs() / r.norm(dim=0)[: r.shape[0]].clamp(min=1e-30)
    if rows.shape[0] > rows.shape[1] or bool((fresh < 1e-6).any()):
        raise ShapeMismatch(
            "the directions are linearly dependent or zero",
            given=f"{rows.shape[0]} directions of length {rows.shape[1]}",
            why="they span no subspace of that many dimensions",
            do="give independent, non-zero directions",
        )
    return q.T.to(rows.dtype).contiguous()


def project_out(directions: Any) -> Op:
    """Remove one direction `[d]` or several `[k, d]`."""
    return ProjectOut(_basis(directions))


def swap_subspace(directions: Any, source: "Run | Tensor") -> Op:
    """Swap in another run's part along the given directions."""
    basis = _basis(directions)
    if isinstance(source, Tensor):
        return SwapSubspace(basis, _float(source, "a source"))
    return SwapSubspaceRun(basis, source)


def affine(weight: Any, bias: Any) -> Op:
    """An affine map: weight `[d]` or `[d, d]`, bias `[d]`."""
    return Affine(_float(weight, "a weight"), _float(bias, "a bias"))


def clamp_feature(*, encoder: Any, decoder: Any, bias: float = 0.0, value: float) -> Op:
    """Set a dictionary feature to `value`."""
    return ClampFeature(_float(encoder, "an encoder"), _float(decoder, "a decoder"), bias, value)


def route(
    *,
    forbid: int | tuple[int, ...] = (),
    force: int | tuple[int, ...] = (),
    shift: dict[int, float] | None = None,
) -> Op:
    """Forbid, force or shift (in logits) experts."""
    as_tuple = [(e,) if isinstance(e, int) else tuple(e) for e in (forbid, force)]
    if not (*as_tuple[0], *as_tuple[1], *(shift or {})):
        raise UsageError(
            "this routes nothing differently",
            given="route()",
            do="name experts: forbid=, force=, shift=",
        )
    return Route(as_tuple[0], as_tuple[1], tuple((shift or {}).items()))


def attend(*, block: int | tuple[int, ...] = (), only: int | tuple[int, ...] | None = None) -> Op:
    """Hide key positions from the queries that `Where` selects, or all but some."""
    hidden = (block,) if isinstance(block, int) else tuple(block)
    shown = (only,) if isinstance(only, int) else only if only is None else tuple(only)
    if not hidden and shown is None:
        raise UsageError(
            "this hides nothing",
            given="attend()",
            do="name key positions: attend(block=...) or attend(only=...)",
        )
    if negative := [k for k in (*hidden, *(shown or ())) if k < 0]:
        raise OutOfRange(
            f"there is no key at position {negative[0]}",
            given=f"block={hidden}, only={shown}",
            why="a prompt and what follows it have no fixed end, so keys count from the start",
            do="count from 0 at the prompt's first token",
        )
    return Attend(hidden, shown)


def call(function: Callable[..., Tensor], *, slots: bool = False) -> Op:
    """Apply any function to the activation.

    Args:
        function: Gets the activation `h` and returns one of its shape.
        slots: At `expert_post` and `expert_out`: it gets `(h, experts)`, where `experts` `[batch,
            pos, slot]` says which expert each slot of `h` belongs to.
    """
    return CallSlots(function) if slots else Call(function)
