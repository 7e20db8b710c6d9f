"""A session: what is recorded and edited while a model runs.

The tap modules find activations and call `session.visit(site, value)`; the session applies the
edits placed there, keeps what was asked for, and hands the (possibly new) value back. It knows
which positions a pass is about (`Frame`), so that taps need not.

A session is active in the thread that entered it and nowhere else (a ContextVar), although the
hooks it installs are visible to all threads: each asks first whether its session is the active one.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from underhood.core.anatomy import Anatomy
from underhood.core.edit import Edit, Fired, Plan, replace_edit
from underhood.core.errors import EditNeverFired, ShapeMismatch, SiteNeverFired, UsageError
from underhood.core.ops import Moment
from underhood.core.site import Site
from underhood.core.tokens import Frame, Where

__all__ = ["Read", "Session", "current_session"]

_CURRENT: ContextVar["Session | None"] = ContextVar("underhood_session", default=None)


def current_session() -> "Session | None":
    """The session that is active in this thread."""
    return _CURRENT.get()


@dataclass(frozen=True)
class Read:
    """One thing to keep.

    Attributes:
        site: A concrete site, perhaps with a unit.
        where: Positions to keep; a prompt must offer the same number in each row.
        device: Where to keep it; None: where it is.
        dtype: In which precision; None: as it is.
    """

    site: Site
    where: Where = field(default_factory=Where)
    device: torch.device | None = None
    dtype: torch.dtype | None = None

    @cached_property
    def whole(self) -> bool:
        """Whether an activation is kept as it is: nothing cut, cast or moved."""
        plain = self.site.unit is None and self.device is None and self.dtype is None
        return plain and self.where.everything


class Session:
    """Records and edits for the passes made inside `with session:`.

    Args:
        module: The model.
        anatomy: Where its sites are.
        plan: Edits at concrete sites, in order.
        reads: What to keep.
        grad: Keep recordings attached to the autograd graph.
        prompt: Number of prompt columns, when the caller knows it (generation); else each pass
            that starts from nothing is a new prompt.
        frame: The frame of the first pass, when the caller made the batch itself.
    """

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        plan: Plan,
        reads: Iterable[Read] = (),
        *,
        grad: bool = False,
        prompt: Frame | None = None,
    ) -> None:
        self.module, self.anatomy, self.plan, self.grad = module, anatomy, plan, grad
        self.fired = [Fired(edit) for edit in plan]
        self.prompt = prompt
        self.frames: dict[str, Frame] = {}
        self.passes = 0
        self._edits: dict[Site, list[_Placed]] = defaultdict(list)
        self._reads: dict[Site, list[tuple[Read, list[Tensor]]]] = defaultdict(list)
        self._gates: dict[Site, Tensor] = {}
        self._lagged: dict[Site, Tensor] = {}
        self._moved: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._kept: dict[Read, list[Tensor]] = {r: [] for r in reads}
        self._counted = 0  # tokens up to the end of the last pass
        self._covered = 0
        self._stack = ExitStack()
        self._token: Token[Session | None] | None = None
        for index, edit in enumerate(plan):
            self._edits[edit.site.whole].append(_Placed.of(index, edit))
        for read, kept in self._kept.items():
            self._reads[read.site.whole].append((read, kept))
        self._gate_sites: dict[Site, set[Site]] = defaultdict(set)
        for gate in (e.gate for e in plan if e.gate is not None):
            self._gate_sites[gate.site.whole].add(gate.site)

    # What is asked for -------------------------------------------------------------------------

    @cached_property
    def sites(self) -> set[Site]:
        """Every site (without unit) that somebody reads, writes or gates on."""
        return {*self._edits, *self._reads, *self._gate_sites}

    def reads(self, site: Site) -> bool:
        """Whether a site is recorded or gated on."""
        return site in self._reads or site in self._gate_sites

    def writes(self, site: Site) -> bool:
        """Whether a site is edited."""
        return site in self._edits

    def wants(self, site: Site) -> bool:
        """Whether a site matters at all in this session."""
        return site in self._edits or self.reads(site)

    # Life ---------------------------------------------------------------------------------------

    def __enter__(self) -> "Session":
        from underhood.core.taps import attention, experts, modules, scans

        if _CURRENT.get() is not None:
            raise UsageError(
                "another plan is already active in this thread",
                given=repr(_CURRENT.get()),
                do="put both plans' edits into one list, or leave the first block",
            )
        try:
            if self.sites:
                self._stack.enter_context(self._watch_passes())
                for part in (modules, attention, experts, scans):
                    part.install(self, self._stack)
        except BaseException:
            self._stack.close()
            raise
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._token is not None:
            _CURRENT.reset(self._token)
        self._stack.close()

    def _watch_passes(self) -> Any:
        # Torch asks whether a hook takes keywords only when it calls it: a hook that another thread
        # has just removed is called without them.
        def before(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
        ) -> None:
            if current_session() is self:
                self._begin_pass(args, kwargs or {})

        handle = self.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        stack = ExitStack()
        stack.callback(handle.remove)
        return stack

    def _begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out which columns this pass is about."""
        self.passes += 1
        self.frames = {}
        self._lagged, self._gates = self._gates, {}
        main = "dec" if "dec" in self.anatomy.stacks else ""
        names = ("decoder_input_ids", "input_ids") if main else ("input_ids", "inputs_embeds")
        given = [kwargs.get(n) for n in names] + list(args[:1])
        ids = next((t for t in given if isinstance(t, Tensor)), None)
        if ids is None or ids.ndim < 2:
            return
        mask = kwargs.get("decoder_attention_mask" if main else "attention_mask")
        frame = self._frame(ids, mask, kwargs)
        self.frames[main] = frame
        if main and isinstance(enc := kwargs.get("input_ids"), Tensor):
            self.frames["enc"] = _plain_frame(enc, kwargs.get("attention_mask"))

    def _frame(self, ids: Tensor, mask: Any, kwargs: dict[str, Any]) -> Frame:
        batch, length = ids.shape[:2]
        cache = next(
            (
                kwargs[n]
                for n in ("past_key_values", "cache_params", "state")
                if kwargs.get(n) is not None
            ),
            None,
        )
        start = 0
        if cache is not None:
            start = _held(cache, self._counted)
            self._counted = start + length
        elif kwargs.get("use_cache") is not False:
            self._counted = length
        frame = Frame(batch, length, start, start + length, cached=cache is not None)
        frame.ids = ids if ids.ndim == 2 and not ids.is_floating_point() else None
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            full = mask.bool()
            frame.mask = full[:, -length:]
            frame.offsets = full.int().argmax(1)
            frame.lengths = full.sum(1)
        if self.prompt is not None and self.prompt.batch == batch:
            frame.prompt, frame.lengths = self.prompt.prompt, self.prompt.lengths
            frame.offsets = self.prompt.offsets
            frame.seen = self._covered if not start else 0
            self._covered = start + length
        elif start:
            previous = getattr(self, "_prompt", None)
            if previous is not None:
                frame.prompt, frame.lengths, frame.offsets = previous
        if not start:
            self._prompt = (frame.prompt, frame.lengths, frame.offsets)
        return frame

    def frame_for(self, stack: str, batch: int, length: int) -> Frame:
        """The frame of a stack in this pass; made from the shape where the pass did not tell."""
        known = self.frames.get(stack)
        if known is not None and (known.batch, known.length) == (batch, length):
            return known
        return self.frames.setdefault(f"{stack}:{batch}:{length}", Frame(batch, length, 0, length))

    # Visits -------------------------------------------------------------------------------------

    def visit(
        self,
        site: Site,
        value: Tensor,
        *,
        columns: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Apply the edits placed at a site and keep what was asked for.

        Args:
            site: Concrete, without unit.
            value: The activation in the site's canonical axes.
            columns: The columns that `value` holds, when a tap computed only some.
            slots: Expert number of each slot, for expert sites.

        Returns:
            The same object when nothing was edited.
        """
        mine = False  # whether `value` is a copy that nobody else holds
        for placed in self._edits.get(site, ()):
            if placed.rows is None:
                value, mine = self._edit(placed.index, placed.edit, value, slots), False
            else:
                value, mine = self._edit_rows(placed, value, slots, mine=mine)
        # Checkpointing runs a block again inside backward: edits must act again, recordings not.
        if torch._C._current_graph_task_id() != -1:
            return value
        for gate in self._gate_sites.get(site, ()):
            self._gates[gate] = _one_unit(gate, value).detach()
        for read, kept in self._reads.get(site, ()):
            kept.append(self._kept_form(read, value, columns, slots))
        return value

    def _pos_axis(self, site: Site, value: Tensor, *, rows: int | None = None) -> int | None:
        """The axis that runs over positions; `rows` when `value` is cut from so many rows."""
        if site.path:
            known = self.frames.get("") or self.frames.get("dec")
            shape = (value.shape[0] if rows is None else rows, *value.shape[1:2])
            return 1 if known is not None and shape == (known.batch, known.length) else None
        return site.kind.pos_axis

    def _edit_rows(
        self, placed: "_Placed", value: Tensor, slots: Tensor | None, *, mine: bool
    ) -> tuple[Tensor, bool]:
        """Apply an edit to its rows alone; the others stay bit for bit.

        Many edits on different rows (a sweep) share one copy of the activation: the first makes it,
        the others write their rows into it.
        """
        batch = value.shape[0]
        known = self.frames.get(placed.edit.site.stack) or self.frames.get("dec")
        if known is not None and known.batch != batch:
            raise _shared_rows(placed.edit.site, batch, known)
        numbers = sorted({row % batch for row in placed.rows or ()})
        rows = torch.tensor(numbers, device=value.device)
        part = value[rows]
        cut = slots[rows] if slots is not None else None
        new = self._edit(placed.index, placed.edit, part, cut, whole=(rows, batch))
        if new is part:
            return value, mine
        out = value if mine else value.clone()
        return out.index_copy_(0, rows, new.to(out.dtype)), True

    def _edit(
        self,
        index: int,
        edit: Edit,
        value: Tensor,
        slots: Tensor | None,
        *,
        whole: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """Apply one edit; the same object where it acts nowhere.

        Args:
            index: Number of the edit in the plan.
            edit: The edit, without `where.rows`.
            value: The activation, all rows of it or some.
            slots: Expert number of each slot, for expert sites.
            whole: When some: their numbers, and how many rows the batch has.
        """
        site = edit.site
        axis = self._pos_axis(site, value, rows=whole[1] if whole else None)
        known = self.frames.get(site.stack)
        if not whole and axis is not None and known is not None and known.lengths is not None:
            if value.shape[0] != known.batch and not edit.where.everything:
                raise _shared_rows(site, value.shape[0], known)
        length = value.shape[axis] if axis is not None else 1
        frame = self.frame_for(site.stack, whole[1] if whole else value.shape[0], length)
        frame = _frame_rows(frame, whole[0]) if whole else frame
        chosen = self._chosen(edit, frame, value.device, axis, whole)
        if chosen is not None and not bool(chosen.any()):
            return value
        unit_axis = None
        part = value
        if site.unit is not None and slots is None:
            unit_axis = site.kind.axes.index(site.kind.unit or "")
            part = value.select(unit_axis, site.unit)
        where = (
            1
            if axis is None
            else (axis - 1 if unit_axis is not None and unit_axis < axis else axis)
        )
        moment = Moment(frame.positions(value.device), where, frame.offsets, slots)
        if whole and (op := edit.op.of_rows(*whole, part.ndim)) is not edit.op:
            edit = replace_edit(edit, op=op)
        new = edit.changed(part, moment, frame)
        if new.shape != part.shape:
            raise ShapeMismatch(
                "the edit changed the activation's shape",
                given=f"{tuple(part.shape)} became {tuple(new.shape)}",
                why=repr(edit),
                do="give tensors whose last axes equal the site's",
            )
        keep = _spread(chosen, part, where) if chosen is not None else None
        if slots is not None and site.unit is not None:
            hit = (slots == site.unit)[..., None]
            keep = hit if keep is None else keep & hit
            if not bool(keep.any()):
                return value
        if keep is not None:
            new = torch.where(keep, new, part)
        self._note(index, part, new, keep, _fresh_places(frame, chosen))
        if unit_axis is None:
            return new
        full = value.clone()
        full.select(unit_axis, site.unit or 0).copy_(new)
        return full

    def _chosen(
        self,
        edit: Edit,
        frame: Frame,
        device: torch.device,
        axis: int | None,
        whole: tuple[Tensor, int] | None,
    ) -> Bool[Tensor, "batch pos"] | None:
        if axis is None:
            return None
        chosen = edit.where.select(frame, device)
        if edit.gate is None:
            return chosen
        gate = self._gate_open(edit, frame, device, whole)
        return gate if chosen is None else chosen & gate

    def _gate_open(
        self, edit: Edit, frame: Frame, device: torch.device, whole: tuple[Tensor, int] | None
    ) -> Tensor:
        gate = edit.gate
        assert gate is not None
        source = self._gates if gate.lag == 0 else self._lagged
        if gate.lag == 0 and gate.site not in source:
            raise UsageError(
                f"the gate reads {gate.site}, and the edit at {edit.site} does not come after it",
                given=repr(edit),
                why="with lag=0 the gate must have been read before the edit acts",
                do="gate on an earlier site, or use lag=1 to read the previous position",
            )
        if gate.lag == 1 and (not frame.cached or frame.start == 0):
            return torch.zeros(frame.batch, frame.length, dtype=torch.bool, device=device)
        reading = source[gate.site]
        opened = gate.open(reading if whole is None else reading[whole[0].to(reading.device)])
        return opened if gate.lag == 0 else opened[:, -1:].expand(-1, frame.length)

    def _note(
        self, index: int, before: Tensor, after: Tensor, keep: Tensor | None, places: int
    ) -> None:
        """Remember how much an edit moved; the sums are read only when the run ends."""
        self.fired[index].places += places
        with torch.no_grad():
            finite = torch.isfinite(before) & torch.isfinite(after)
            old = torch.where(finite, before, 0).float()
            new = torch.where(finite, after, 0).float()
            moved, size = (new - old).pow(2).sum(), old.pow(2)
            size = size * keep if keep is not None else size
            self._moved[index].append((moved, size.sum()))

    def _kept_form(
        self, read: Read, value: Tensor, columns: Tensor | None, slots: Tensor | None
    ) -> Tensor:
        """What is kept of an activation: cut, cast, moved, and a copy."""
        site = read.site
        if read.whole and not self.grad and self.prompt is None:
            return value.detach().clone(memory_format=torch.contiguous_format)
        axis = self._pos_axis(site, value)
        if site.unit is not None and slots is not None:
            value = torch.where((slots == site.unit)[..., None], value, 0).sum(-2)
        elif site.unit is not None:
            unit_axis = site.kind.axes.index(site.kind.unit or "")
            value = value.select(unit_axis, site.unit)
            axis = axis - 1 if axis is not None and unit_axis < axis else axis
        if not self.grad:
            value = value.detach()
        if axis is not None:
            value = self._cut(read, value, axis, columns)
        fresh = value.to(device=read.device or value.device, dtype=read.dtype or value.dtype)
        # A copy, never an alias: models add to their residual in place.
        if fresh.data_ptr() == value.data_ptr() and not self.grad:
            fresh = fresh.clone(memory_format=torch.contiguous_format)
        return fresh

    def _cut(self, read: Read, value: Tensor, axis: int, columns: Tensor | None) -> Tensor:
        """Only the positions asked for, row by row: `[batch, chosen, ...]` on the same axis.

        Positions that an earlier pass recorded are left out.
        """
        known = self.frames.get(read.site.stack)
        if known is not None and value.shape[0] == 1 and not read.where.everything:
            value = value.expand(
                known.batch, *value.shape[1:]
            )  # learned positions: one row for all
        batch, length = value.shape[0], value.shape[axis]
        if columns is None or known is None:
            known = self.frame_for(read.site.stack, batch, length)
        if read.where.everything and not known.seen:
            return value
        chosen = read.where.select(known, value.device)
        if read.where.everything or chosen is None:
            chosen = torch.ones(batch, known.length, dtype=torch.bool, device=value.device)
        if known.seen:
            chosen = chosen & (torch.arange(known.length, device=value.device) >= known.seen)
        chosen = chosen if columns is None else chosen[:, columns]
        counts = chosen.sum(1)
        if not bool((counts == counts[0]).all()):
            raise UsageError(
                "rows differ in how many positions are recorded",
                given=f"{counts.tolist()} positions for {read.where!r}",
                do="record positions that every row has, or run the rows one by one",
            )
        index = chosen.nonzero()[:, 1].view(batch, -1)
        moved = value.transpose(1, axis)
        rows = torch.arange(batch, device=value.device)[:, None]
        return moved[rows, index].transpose(1, axis)

    def wanted_columns(self, site: Site, frame: Frame, device: torch.device) -> Tensor | None:
        """Columns that recordings of a site need, or None when all (or when it is edited)."""
        if site in self._edits or site in self._gate_sites:
            return None
        need: Int[Tensor, " n"] | None = None
        union = torch.zeros(frame.length, dtype=torch.bool, device=device)
        for read, _ in self._reads.get(site, ()):
            chosen = read.where.select(frame, device)
            if chosen is None or read.where.everything:
                return None
            union |= chosen.any(0)
        if not bool(union.all()):
            need = union.nonzero()[:, 0]
        return need

    # The end ------------------------------------------------------------------------------------

    def recordings(self) -> dict[Read, Tensor]:
        """What was kept, passes joined along their position axis.

        Raises:
            SiteNeverFired: A site that the passes never came to.
        """
        out: dict[Read, Tensor] = {}
        for read, parts in self._kept.items():
            if not parts:
                raise SiteNeverFired(
                    f"the model never passed {read.site}",
                    given=f"{self.passes} passes",
                    why="this layer is of another kind, or its code was replaced by a fused kernel",
                    do="see `underhood inspect MODEL --sites`, or load without custom kernels",
                )
            axis = self._pos_axis(read.site, parts[0]) if len(parts) > 1 else None
            out[read] = parts[0] if len(parts) == 1 else _join(parts, read.site, axis)
        return out

    def close_report(self, *, must_fire: bool = True) -> list[Fired]:
        """How often each edit fired and how much it moved.

        Raises:
            EditNeverFired: An edit that acted nowhere.
        """
        for index, entry in enumerate(self.fired):
            moved = sum(float(m) for m, _ in self._moved[index])
            size = sum(float(s) for _, s in self._moved[index])
            entry.moved = (moved**0.5) / (size**0.5) if size > 0 else float(moved > 0)
            if must_fire and not entry.places:
                raise EditNeverFired(
                    "an edit acted nowhere",
                    given=repr(entry.edit),
                    why=f"in {self.passes} passes no position met its conditions",
                    do="check its site, positions, phase and gate",
                )
        return self.fired


def _held(cache: Any, counted: int) -> int:
    """Tokens in a cache; those of pure state-space models only know whether they are empty."""
    try:
        held = int(cache.get_seq_length())
        # A first layer without keys says 0 whatever the others hold (MiniMax).
        others = getattr(cache, "layers", ()) if not held else ()
        return max([held, *(int(x.get_seq_length()) for x in others if hasattr(x, "keys"))])
    except (AttributeError, ValueError):
        pass
    try:
        return counted if cache.has_previous_state() else 0
    except (AttributeError, ValueError, TypeError):
        return counted


def _shared_rows(site: Site, batch: int, known: Frame) -> ShapeMismatch:
    return ShapeMismatch(
        f"the rows of the batch cannot be told apart at {site}",
        given=f"{batch} rows there, {known.batch} in the batch",
        why="the module shares one row among all prompts, or flattens rows and positions",
        do="edit all rows and positions there, run the prompts one by one, or use another site",
    )


def _fresh_places(frame: Frame, chosen: Tensor | None) -> int:
    """Positions that an edit acts on and that no earlier pass of the generation covered."""
    seen = min(frame.seen, frame.length)
    if chosen is None:
        return frame.batch * (frame.length - seen)
    return int(chosen[:, seen:].sum()) if chosen.shape[1] == frame.length else int(chosen.sum())


def _one_unit(site: Site, value: Tensor) -> Tensor:
    """What a site with a unit is in the activation of the whole site."""
    if site.unit is None:
        return value
    return value.select(site.kind.axes.index(site.kind.unit or ""), site.unit)


@dataclass(frozen=True, slots=True)
class _Placed:
    """An edit of the plan: its number, itself without its rows, and its rows."""

    index: int
    edit: Edit
    rows: tuple[int, ...] | None

    @classmethod
    def of(cls, index: int, edit: Edit) -> "_Placed":
        where = edit.where
        if where.rows is None:
            return cls(index, edit, None)
        rest = Where(where.pos, tokens=where.tokens, phase=where.phase, steps=where.steps)
        return cls(index, replace_edit(edit, where=rest), where.rows)


def _frame_rows(frame: Frame, rows: Tensor) -> Frame:
    """The frame of some rows of a pass."""

    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows.to(value.device)]

    return replace(
        frame, batch=len(rows), offsets=cut(frame.offsets), mask=cut(frame.mask),
        ids=cut(frame.ids), lengths=cut(frame.lengths), cache={},
    )  # fmt: skip


def _spread(chosen: Tensor, value: Tensor, axis: int) -> Tensor:
    """A `[batch, pos]` mask, shaped to broadcast over `value`."""
    shape = [1] * value.ndim
    shape[0] = chosen.shape[0]
    if chosen.shape[1] > 1:
        shape[axis] = chosen.shape[1]
    return chosen.view(shape)


def _plain_frame(ids: Tensor, mask: Any) -> Frame:
    frame = Frame(ids.shape[0], ids.shape[1], 0, ids.shape[1])
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
        frame.mask, frame.offsets = mask.bool(), mask.int().argmax(1)
        frame.lengths = mask.sum(1)
    return frame


def _join(parts: list[Tensor], site: Site, axis: int | None) -> Tensor:
    """Join passes along positions; patterns grow to the longest key axis, zeros where none was."""
    if axis is None:
        return torch.stack(parts)
    unit = site.unit is not None and site.kind.axes.index(site.kind.unit or "") < axis
    axis = axis - 1 if unit else axis
    if "key" in site.kind.axes:
        longest = max(p.shape[-1] for p in parts)
        fill = -torch.inf if site.name.endswith("scores") else 0.0
        parts = [nn.functional.pad(p, (0, longest - p.shape[-1]), value=fill) for p in parts]
    return torch.cat(parts, axis)
