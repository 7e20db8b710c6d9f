"""Edits: a change as data. Site x op x where x when x how strong.

An `Edit` is immutable and printable; a `Plan` is an ordered list of them and what is saved to a
file. The same plan means the same in a forward, in `generate`, under autograd and in a sweep. With
strength s the activation becomes `h + s * (op(h) - h)`; at s = 1 it is exactly `op(h)`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.errors import (
    OutOfRange,
    PlanError,
    ShapeMismatch,
    UnderhoodError,
    UsageError,
    nearest,
)
from underhood.core.files import read_document, write_document
from underhood.core.ops import OPS, Add, Attend, Call, Moment, Op, like
from underhood.core.shown import Shown
from underhood.core.site import Site
from underhood.core.tokens import Frame, Where

__all__ = ["Edit", "Fired", "Gate", "Plan", "Schedule"]

UNITS = ("raw", "sigma", "norm")
PLAN_SCHEMA = "plan/1"


@dataclass(frozen=True, eq=False)
class Gate:
    """Let an edit act only where another activation lies on one side of a threshold.

    The reading is `h · direction` at the gate's site (a residual site, or one head as in `z.9.6`),
    at the same position. With `lag=0` the gate must run earlier in the same pass than the edit;
    with `lag=1` it is read at the previous position (cached generation only), and is closed where
    there is none.
    """

    site: Site
    direction: Float[Tensor, " d"]
    threshold: float
    above: bool
    lag: int

    def __init__(
        self,
        site: str | Site,
        direction: Float[Tensor, " d"],
        threshold: float = 0.0,
        *,
        above: bool = True,
        lag: int = 0,
    ) -> None:
        place = Site.parse(site)
        values = {
            "site": place, "direction": direction, "threshold": float(threshold), "above": above,
            "lag": lag,
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if lag not in (0, 1):
            raise UsageError(
                "a gate's lag is 0 or 1",
                given=lag,
                why="it reads this position, or the one before",
                do="choose 0 or 1",
            )
        vectors = _vector_axes(place) == ("batch", "pos") and place.kind.axes[-1] != "slot"
        if place.spreads or place.path or not vectors:
            raise UsageError(
                "a gate reads one vector per position",
                given=str(place),
                why=f"its axes are {' '.join(place.kind.axes)}"
                + (", in every layer" if place.spreads else ""),
                do="use a residual site such as resid_post.3, or one head such as z.3.0",
            )

    def open(self, h: Tensor) -> Bool[Tensor, "batch pos"]:
        """Where the gate is open, from the gate site's activation.

        Raises:
            ShapeMismatch: The direction has another length than the activation.
        """
        if self.direction.shape[0] != h.shape[-1]:
            raise ShapeMismatch(
                "the gate's direction does not fit its site",
                given=f"length {self.direction.shape[0]}",
                why=f"{self.site} has {h.shape[-1]} on its last axis",
                do=f"give a direction of length {h.shape[-1]}",
            )
        reading = h.float() @ self.direction.float().to(h.device)
        return reading > self.threshold if self.above else reading < self.threshold


def _vector_axes(site: Site) -> tuple[str, ...]:
    """Axes before the last of what a site gives at its unit."""
    axes = site.kind.axes
    return tuple(a for a in axes if site.unit is None or a != site.kind.unit)[:-1]


@dataclass(frozen=True)
class Schedule:
    """Strength over generated tokens: straight lines between `(step, factor)` points.

    The prompt counts as step 0; before the first and after the last point the factor stays.

    Example:
        >>> Schedule(((0, 1.0), (10, 0.0)))      # fade out over ten tokens
        Schedule(points=((0, 1.0), (10, 0.0)))
    """

    points: tuple[tuple[int | float, int | float], ...]

    def __post_init__(self) -> None:
        steps = [s for s, _ in self.points]
        if not steps or steps != sorted(steps):
            raise UsageError(
                "a schedule needs (step, factor) points in order",
                given=self.points,
                do="give at least one point, and sort them by step",
            )

    def factor(self, step: Tensor) -> Tensor:
        """Factor at each step (`step` counts from 0; any shape)."""
        xs = torch.tensor([s for s, _ in self.points], dtype=torch.float32, device=step.device)
        ys = torch.tensor([f for _, f in self.points], dtype=torch.float32, device=step.device)
        x = step.float().clamp(float(xs[0]), float(xs[-1]))
        right = torch.searchsorted(xs, x).clamp(1, max(len(self.points) - 1, 1))
        if len(self.points) == 1:
            return ys[0].expand_as(x)
        left = right - 1
        share = (x - xs[left]) / (xs[right] - xs[left]).clamp(min=1e-9)
        return ys[left] + share * (ys[right] - ys[left])


@dataclass(frozen=True)
class Edit(Shown):
    """One change to one site.

    Args:
        site: Where in the model; a layered name without a layer means every layer.
        op: What to do there (`uh.zero()`, `uh.add(v)`, ...).
        where: Which positions and rows; default all real tokens.
        strength: How much of the op: 0 nothing, 1 all of it. For `add` in the given unit.
        unit: For `add`: "raw" (the vector as it is), "sigma" (multiples of `sigma`, the site's own
            standard deviation), or "norm" (fraction of each position's own norm); for the last
            two the vector is scaled to length 1 first.
        sigma: The site's standard deviation, for unit "sigma"; `model.sigma(site, prompts)`.
        gate: Act only where the gate is open.
        schedule: Strength over generated tokens.

    Example:
        >>> import underhood as uh
        >>> uh.Edit("z.1.2", uh.zero())
        Edit(z.1.2, zero)
    """

    site: Site
    op: Op
    where: Where = field(default_factory=Where)
    strength: float = 1.0
    unit: str = "raw"
    sigma: float | None = None
    gate: Gate | None = None
    schedule: Schedule | None = None

    def __init__(
        self,
        site: str | Site,
        op: Op,
        where: Where | int | Sequence[int] | None = None,
        *,
        strength: float = 1.0,
        unit: str = "raw",
        sigma: float | None = None,
        gate: Gate | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        place = Site.parse(site)
        spot = where if isinstance(where, Where) else Where(where)
        values = {
            "site": place, "op": op, "where": spot, "strength": float(strength), "unit": unit,
            "sigma": sigma, "gate": gate, "schedule": schedule,
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._validate()
        if not place.spreads:
            object.__setattr__(self, "op", op.bind(place))

    def _validate(self) -> None:
        kind = self.site.kind
        if not kind.writable:
            raise UsageError(
                f"the site {self.site.name!r} can be read, not written",
                given=repr(self),
                do="edit router_logits or the site's inputs instead",
            )
        if self.op.only_on and self.site.name not in self.op.only_on:
            raise UsageError(
                f"the op {self.op.name!r} works on {' or '.join(self.op.only_on)} only",
                given=str(self.site),
                do=f"use the site {self.op.only_on[0]}.{self.site.layer or 0}",
            )
        if self.unit not in UNITS:
            raise UsageError(
                f"there is no unit {self.unit!r}", given=self.unit, do=f"use {', '.join(UNITS)}"
            )
        if self.unit != "raw" and not isinstance(self.op, Add):
            raise UsageError(
                f"the unit {self.unit!r} is for `add`", given=repr(self), do="leave the unit out"
            )
        if self.unit == "sigma" and self.sigma is None:
            raise UsageError(
                "a strength in sigma needs the site's sigma",
                given=repr(self),
                do="measure it: model.sigma(site, prompts), and pass sigma=",
            )

    def __repr__(self) -> str:
        parts = [str(self.site), self.op.name]
        if not self.where.everything:
            parts.append(repr(self.where))
        if self.strength != 1.0 or self.unit != "raw":
            parts.append(f"strength={self.strength:g} {self.unit}")
        if self.gate is not None:
            parts.append(f"gate={self.gate.site}")
        if self.schedule is not None:
            parts.append("scheduled")
        return f"Edit({', '.join(parts)})"

    def at(self, site: Site) -> "Edit":
        """The same edit at another (concrete) site."""
        return replace_edit(self, site=site)

    def changed(self, h: Tensor, moment: Moment, frame: Frame) -> Tensor:
        """The activation after this edit, as if it fired everywhere (selection comes after)."""
        if self.unit == "raw" and self.strength == 1.0 and self.schedule is None:
            return self._applied(h, moment)
        delta = self._delta(h, moment)
        if self.schedule is not None:
            lengths = frame.prompt_lengths(h.device)[:, None]
            step = (moment.positions - lengths).clamp(min=0)
            shape = [1] * h.ndim
            shape[0], shape[moment.pos_axis] = step.shape
            delta = delta * self.schedule.factor(step).view(shape).to(h.dtype)
        return h + self.strength * delta

    def _delta(self, h: Tensor, moment: Moment) -> Tensor:
        if self.unit == "raw" or not isinstance(self.op, Add):
            return self._applied(h, moment) - h
        vector = like(self.op.vector, h)
        if vector.shape[-1] not in (1, h.shape[-1]):
            raise self._misfit(h, f"its last axis is {vector.shape[-1]}")
        direction = vector / vector.norm().clamp(min=1e-12)
        if self.unit == "sigma":
            return (direction * float(self.sigma or 0.0)).expand_as(h)
        return direction * h.norm(dim=-1, keepdim=True)

    def _applied(self, h: Tensor, moment: Moment) -> Tensor:
        """The op's result; torch's complaint about shapes becomes ours."""
        if isinstance(self.op, Call):
            return self.op.apply(h, moment)
        try:
            return self.op.apply(h, moment)
        except RuntimeError as error:
            if isinstance(error, UnderhoodError):
                raise
            raise self._misfit(h, str(error).splitlines()[0]) from error

    def _misfit(self, h: Tensor, detail: str) -> ShapeMismatch:
        shapes = {k: tuple(v.shape) for k, v in self.op.tensors().items()}
        return ShapeMismatch(
            "the edit's tensors do not fit the activation",
            given=f"{self!r} with {shapes}",
            why=f"the activation has shape {tuple(h.shape)} ({detail})",
            do="give tensors whose last axes equal the site's",
        )


def replace_edit(edit: Edit, **changes: Any) -> Edit:
    """A copy of an edit with some arguments changed."""
    values = {f.name: getattr(edit, f.name) for f in fields(edit)} | changes
    return Edit(values.pop("site"), values.pop("op"), values.pop("where"), **values)


@dataclass(slots=True)
class Fired:
    """What one edit did in one run.

    Attributes:
        edit: The edit.
        places: Positions (over rows and passes) at which it acted.
        moved: ‖dh‖ / ‖h‖ over those positions.
    """

    edit: Edit
    places: int = 0
    moved: float = 0.0


class Plan(Shown, Sequence[Edit]):
    """An ordered, immutable list of edits; later edits see what earlier ones left.

    Example:
        >>> import underhood as uh
        >>> plan = uh.Plan([uh.Edit("z.0.1", uh.zero())])
        >>> len(plan)
        1
    """

    def __init__(
        self, edits: Iterable[Edit] | Edit = (), *, model: dict[str, Any] | None = None
    ) -> None:
        self.edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
        for edit in self.edits:
            if not isinstance(edit, Edit):
                raise UsageError("a plan holds edits", given=repr(edit), do="pass Edit(...) values")
        self.model = model

    def __getitem__(self, index: Any) -> Any:
        return self.edits[index]

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __repr__(self) -> str:
        return f"Plan([{', '.join(map(repr, self.edits))}])"

    def to(self, device: torch.device | str) -> "Plan":
        """The same plan with its tensors on another device."""
        moved = []
        for edit in self.edits:
            tensors = {k: v.to(device) for k, v in edit.op.tensors().items()}
            gate = edit.gate
            if gate is not None:
                gate = Gate(
                    gate.site, gate.direction.to(device), gate.threshold,
                    above=gate.above, lag=gate.lag,
                )  # fmt: skip
            moved.append(replace_edit(edit, op=replace(edit.op, **tensors), gate=gate))
        return Plan(moved, model=self.model)

    def save(self, path: str | Path) -> Path:
        """Write `NAME.json`, and `NAME.safetensors` beside it when there are tensors.

        Raises:
            PlanError: An edit holds a Python function, which a file cannot.
        """
        tensors: dict[str, Tensor] = {}
        rows = [_edit_doc(edit, i, tensors) for i, edit in enumerate(self.edits)]
        document = {"schema": PLAN_SCHEMA, "model": self.model, "edits": rows}
        return write_document(Path(path), document, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan file.

        Raises:
            PlanError: Truncated, of a newer version, or not a plan.
        """
        document, tensors = read_document(Path(path), PLAN_SCHEMA, PlanError)
        try:
            edits = [_edit_from(row, tensors) for row in document["edits"]]
            model = document.get("model")
            if not isinstance(model, dict | None):
                raise TypeError(f"model is {type(model).__name__}")
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                "the plan file misses a part",
                given=str(path),
                why=f"{type(error).__name__}: {error}",
                do="save the plan again",
            ) from error
        return cls(edits, model=model)


def _edit_doc(edit: Edit, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if (
        isinstance(edit.op, Call)
        or edit.op.name not in OPS
        or type(edit.op) is not OPS[edit.op.name]
    ):
        raise PlanError(
            f"the op {edit.op.name!r} cannot be saved",
            given=repr(edit),
            why="it holds a Python function, or a run that has not met its site",
            do="use an op that is data, at a site with a layer",
        )
    op: dict[str, Any] = {"name": edit.op.name}
    for key, value in vars(edit.op).items():
        if isinstance(value, Tensor):
            tensors[f"{index}.{key}"] = value
        else:
            op[key] = value
    row: dict[str, Any] = {"site": str(edit.site), "op": op, "strength": edit.strength}
    row["where"] = {k: v for k, v in asdict(edit.where).items() if v is not None}
    if edit.unit != "raw":
        row |= {"unit": edit.unit, "sigma": edit.sigma}
    if edit.schedule is not None:
        row["schedule"] = edit.schedule.points
    if edit.gate is not None:
        tensors[f"{index}.gate"] = edit.gate.direction
        gate = edit.gate
        row["gate"] = {
            "site": str(gate.site), "threshold": gate.threshold, "above": gate.above,
            "lag": gate.lag,
        }  # fmt: skip
    return json.loads(json.dumps(row)) | {"index": index}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _edit_from(row: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    index, stored = row["index"], dict(row["op"])
    name = stored.pop("name")
    if name not in OPS:
        raise PlanError(f"there is no op {name!r}", given=name, do=f"nearest: {nearest(name, OPS)}")
    values = {k: _tuples(v) for k, v in stored.items()}
    prefix = f"{index}."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    direction = own.pop("gate", None)
    where = {k: _tuples(v) for k, v in row.get("where", {}).items()}
    gate = None
    if row.get("gate"):
        if direction is None:  # without its gate the edit would act everywhere
            raise KeyError(f"{index}.gate")
        gate = Gate(**row["gate"], direction=direction)
    schedule = Schedule(_tuples(row["schedule"])) if row.get("schedule") else None
    return Edit(
        row["site"], OPS[name](**values, **own), Where(where.pop("pos", None), **where),
        strength=row.get("strength", 1.0), unit=row.get("unit", "raw"), sigma=row.get("sigma"),
        gate=gate, schedule=schedule,
    )  # fmt: skip


def as_plan(edits: "Plan | Edit | Iterable[Edit] | None") -> Plan:
    """Whatever a caller passes as edits, as a plan."""
    if isinstance(edits, Plan):
        return edits
    return Plan(edits if edits is not None else ())


def check_keys(edit: Edit, lengths: Sequence[int] | None) -> None:
    """Refuse to hide key positions that no prompt has.

    Raises:
        OutOfRange: No row is as long as that.
    """
    if not isinstance(edit.op, Attend) or edit.site.name != "scores" or lengths is None:
        return
    longest = max(lengths, default=0)
    for pos in (*edit.op.block, *(edit.op.only or ())):
        if pos >= longest:
            raise OutOfRange(
                f"there is no key at position {pos}",
                given=repr(edit),
                why=f"the longest prompt has {longest} tokens",
                do=f"use 0 to {longest - 1}",
            )


def check_width(edit: Edit, size: int | None) -> None:
    """Refuse a vector that cannot fit the site, before anything runs.

    Raises:
        ShapeMismatch: The op's last axis differs from the site's.
    """
    width = edit.op.width
    if size is not None and width is not None and width not in (size, 1):
        raise ShapeMismatch(
            f"the edit's tensor does not fit {edit.site}",
            given=f"last axis {width}",
            why=f"{edit.site} has {size} on its last axis",
            do=f"give a vector of length {size}",
        )


def in_rows(edit: Edit, rows: range, offset: int, batch: int) -> Edit | None:
    """An edit on `batch` prompts, moved to where some of them lie in a bigger batch.

    Args:
        edit: The edit; its `where.rows` names prompts.
        rows: The prompts that the bigger batch holds.
        offset: Row of the first of them.
        batch: How many prompts there are.

    Returns:
        None when the edit concerns none of these prompts.
    """
    named = edit.where.rows
    own = list(range(batch)) if named is None else sorted({r % batch for r in named})
    index = [i for i, row in enumerate(own) if row in rows]
    if not index:
        return None
    taken, op = torch.tensor([own[i] for i in index]), edit.op
    if len(index) < batch:
        axes, unit = edit.site.kind.axes, edit.site.kind.unit
        # One expert of several is no axis: that of slots stays.
        ndim = 3 if edit.site.path else len(axes) - (edit.site.unit is not None and unit in axes)
        op = op.of_rows(taken, batch, ndim)
        op = op.of_rows(torch.tensor(index), len(own), ndim) if op is edit.op else op
    spots = (taken - rows.start + offset).tolist()
    where = edit.where
    there = Where(where.pos, rows=spots, tokens=where.tokens, phase=where.phase, steps=where.steps)
    return replace_edit(edit, op=op, where=there)
