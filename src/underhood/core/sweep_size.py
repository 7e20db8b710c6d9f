"""How big a sweep is: the memory of a pass, how many rows fit, how many passes and how long.

Memory is measured, not guessed: a forward of one row and one of two, with every tensor that torch
makes counted while it lives. What a pass of more rows needs follows, since rows do not share. The
measuring forwards are made only where they can matter: a cap was given, or a generous guess comes
near what the machine has free. What kernels use inside is not seen; a margin stands for it.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from underhood.core.edit import Plan
from underhood.core.errors import MemoryTooSmall
from underhood.core.growing import Growing, groups
from underhood.core.model import Model
from underhood.core.sweep_plain import Plain
from underhood.core.sweep_tail import Tail
from underhood.core.tokens import Tokens

__all__ = ["Estimate", "Fit", "estimated", "fitting", "free_memory", "readable_bytes"]

SHARE = 0.5  # of what is free may be used when nobody said how much
MARGIN = 1.1  # what kernels use inside, over the tensors that are seen
PREFIXES = 0.25  # of the memory may be kept in caches of prefixes
TIMED_ROWS = 4

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a sweep would take, found without running it.

    Attributes:
        cells: Cells to run.
        passes: Forward passes of the sweep itself.
        rows: Rows of the biggest pass.
        memory: Bytes that the biggest pass needs at its worst moment, beside the weights.
        seconds: How long the sweep takes. From two or three short forwards on the machine as it is
            now: expect it to be right within a factor of two, not within a tenth.
        how: "shared prefix" or "plain batching".
        why: Why it is run so, and what bounds the rows.
    """

    cells: int
    passes: int
    rows: int
    memory: int
    seconds: float
    how: str
    why: str

    def __str__(self) -> str:
        return (
            f"{self.cells:,} cells in {self.passes:,} passes of up to {self.rows:,} rows:"
            f" about {_readable_time(self.seconds)},"
            f" {readable_bytes(self.memory)} at the most beside the weights\n"
            f"  How:     {self.how}\n"
            f"  Because: {self.why}\n"
            f"  The time comes from a few short forwards; it is right within a factor of two."
        )


def readable_bytes(n: float | int) -> str:
    """Bytes as people read them: `3.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" or n >= 100 else f"{n:.2g} {unit}"
        n = n / 1000
    return f"{n:.3g} TB"


def _readable_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 100 else f"{minutes / 60:.2g} h"


# What is free -------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Bytes that a job may still take on a device; None where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
    found = [n for n in (_system_free(), _group_free()) if n is not None]
    return min(found) if device.type == "cpu" and found else None


def _system_free() -> int | None:
    """What the system can hand out without swapping."""
    try:  # counts what disk caches would give back, which the free pages alone do not
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _group_free() -> int | None:
    """What a container's limit leaves."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = (_CGROUP / "memory.stat").read_text().splitlines()
        cache = sum(int(x.split()[1]) for x in stat if x.startswith("inactive_file "))
        return None if limit == "max" else max(int(limit) - used + cache, 0)
    except (OSError, ValueError, IndexError):
        return None


# What a pass takes --------------------------------------------------------------------------------


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Storages by address: views and results written in place are nothing new.
        known = {s._cdata for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        out = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(out)):
            key = storage._cdata if storage is not None else 0
            if storage is None or key in known or key in self._made:
                continue
            self._made[key] = weakref.ref(storage, self._forget(key)), storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return out

    def _forget(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.live -= self._made.pop(key)[1]

        return gone


def _storage(leaf: Any) -> Any:
    return leaf.untyped_storage() if isinstance(leaf, Tensor) else None


@dataclass(frozen=True, slots=True)
class Fit:
    """How many rows a pass may have.

    Attributes:
        rows: That many.
        bound: What bounds them, in words.
        room: Bytes that caches of prefixes may hold; None: no limit.
    """

    rows: int
    bound: str
    room: int | None = None


def fitting(
    model: Model, tokens: Tokens, plans: Sequence[Plan], tail: Tail, rows: int, memory: int | None
) -> Fit:
    """The most rows up to `rows` that fit into a memory; measured where it can matter.

    Raises:
        MemoryTooSmall: Not even one row fits.
    """
    usual = Fit(rows, f"{rows} rows a pass asked for, or usual")
    free = free_memory(model.device) if memory is None else None
    cap = memory if memory is not None else int(SHARE * free) if free is not None else None
    if cap is None:
        return usual
    if memory is None and rows * _rough(model, tokens, plans) < cap:
        return Fit(usual.rows, usual.bound, int(PREFIXES * cap))
    need = _measured(model, tokens, plans, tail)
    # A growing pass has the unedited row besides, and caches of prefixes are kept beside it.
    fit = int((cap * (1 - PREFIXES) - need.fixed) // need.row) - 1
    most = memory if memory is not None else free or 0
    if fit < 1 and need.of(2) > most:
        raise MemoryTooSmall(
            "not even one row of this sweep fits into its memory",
            given=f"{readable_bytes(most)} ({'memory=' if memory is not None else 'free: '}{most})",
            why=f"a pass of one cell over {tokens.ids.shape[1]} columns needs"
            f" {readable_bytes(need.of(2))} beside the weights",
            do=f"give memory={need.of(2)} or more, shorter prompts, or a model of half precision",
        )
    fit = max(1, min(fit, rows))
    bound = usual.bound if fit == rows else f"{readable_bytes(cap)} of memory: {fit} rows a pass"
    return Fit(fit, bound, int(PREFIXES * cap))


def _rough(model: Model, tokens: Tokens, plans: Sequence[Plan]) -> int:
    """Bytes of one row, guessed high from the widths of the weights."""
    columns = tokens.ids.shape[1]
    wide = max((max(p.shape) for p in model.module.parameters() if p.ndim > 1), default=1)
    narrow = getattr(model.config, "vocab_size", None)
    inner = [
        max(p.shape[-2:]) for p in model.module.parameters()
        if p.ndim > 1 and max(p.shape) != narrow
    ]  # fmt: skip
    each = torch.finfo(model.dtype).bits // 8 + 4
    heads = max(model.n_heads, 1) * columns if _looks(model, plans) else 0
    return each * (columns * (8 * max(inner, default=wide) + 3 * heads) + 4 * wide)


def _looks(model: Model, plans: Sequence[Plan]) -> bool:
    """Whether attention is written out as a matrix."""
    eager = getattr(model.config, "_attn_implementation", "eager") == "eager"
    return eager or any("key" in edit.site.kind.axes for plan in plans for edit in plan)


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes of a pass: some of its own, and some for each row."""

    fixed: int
    row: int

    def of(self, rows: int) -> int:
        return self.fixed + rows * self.row


def _rank(plan: Plan) -> int:
    """Cells at wide places need most."""
    axes = {axis for edit in plan for axis in edit.site.kind.axes}
    return 2 * ("key" in axes) + bool(axes & {"neuron", "slot", "head", "vocab"})


def _probe(model: Model, tokens: Tokens, plans: Sequence[Plan], tail: Tail, rows: int) -> Any:
    """A pass of some rows of the longest prompt, with the widest cell, ready to be made."""
    longest = max(range(len(tokens)), key=lambda i: tokens.lengths[i])
    cell = max(range(len(plans)), key=lambda c: _rank(plans[c]))
    job = Plain(model, tokens, plans, tail=tail)
    return lambda: job.logits([cell] * rows, range(longest, longest + 1))


def _measured(model: Model, tokens: Tokens, plans: Sequence[Plan], tail: Tail) -> _Need:
    """What passes need, from one of one row and one of two."""
    peaks = []
    for rows in (1, 2):
        run = _probe(model, tokens, plans, tail, rows)
        try:
            with _Meter() as meter:
                run()
        except torch.OutOfMemoryError as error:
            raise MemoryTooSmall(
                "not even one row of this sweep fits into its memory",
                given=f"{readable_bytes(free_memory(model.device) or 0)} free",
                why=str(error).splitlines()[0],
                do="give shorter prompts, a model of half precision, or another device",
            ) from error
        peaks.append(int(MARGIN * meter.peak))
    row = max(peaks[1] - peaks[0], 1)
    return _Need(max(peaks[0] - row, 0), row)


# How long -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """What passes have to do: how many there are, the rows of the biggest, and all their work."""

    passes: int
    rows: int
    units: float


def _head_units(model: Model, tail: Tail) -> float:
    """The head's work on one row, in those of one column through one layer."""
    body = sum(p.numel() for p in model.module.parameters() if p.ndim > 1)
    table = model.anatomy.head
    weight = getattr(model.module.get_submodule(table), "weight", None) if table else None
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not model.n_layers:
        return 0.0
    size = weight.numel()
    layer = max(body - size, 1) / model.n_layers
    share = len(tail.columns) / weight.shape[0] if tail.narrow and tail.columns is not None else 1.0
    return size * share / layer


def _shared_work(job: Growing, plans: Sequence[Plan], first: int, rows: int, head: float) -> _Work:
    """The passes of `Growing` over all groups and prompts."""
    layers = job.model.n_layers
    passes, most, units = 0, 0, 0.0
    starts: dict[int, set[int]] = {}
    for cells in groups(plans, first, layers, rows):
        for prompt, tokens in enumerate(job.prompts):
            length, start = tokens.ids.shape[1], job.start(cells, prompt)
            depths = job.depths(job.concerned(cells, prompt))
            if start and start not in starts.setdefault(prompt, set()):
                starts[prompt].add(start)
                passes, units = passes + 1, units + start * layers + head
            most = max(most, len(depths) + 1)
            units += (length - start) * (sum(depths) + layers) + (len(depths) + 1) * head
            passes += 1
    for tokens in job.prompts:
        passes, units = passes + 1, units + tokens.ids.shape[1] * layers + head
    return _Work(passes, most, units)


def _plain_work(model: Model, tokens: Tokens, cells: int, rows: int, head: float) -> _Work:
    batch, each = len(tokens), max(1, rows // len(tokens))
    chunks = -(-cells // each)
    blocks = -(-batch // rows)
    most = min(each, cells) * batch if blocks == 1 else rows
    units = cells * batch * (tokens.ids.shape[1] * max(model.n_layers, 1) + head)
    return _Work(chunks * blocks, most, units)


def estimated(
    model: Model, tokens: Tokens, plans: Sequence[Plan], tail: Tail, fit: Fit, reason: str | None
) -> Estimate:
    """Passes counted, memory measured, seconds from short forwards; see `sweep.estimate`."""
    head = _head_units(model, tail)
    shared = reason is None
    if shared:
        job = Growing(model, tokens, plans, tail=tail)
        work = _shared_work(job, plans, tokens.lengths[0], fit.rows, head)
    else:
        work = _plain_work(model, tokens, len(plans), fit.rows, head)
    need = _measured(model, tokens, plans, tail)
    longest = max(tokens.lengths)
    row = longest * max(model.n_layers, 1) + head
    one, several = (_seconds(_probe(model, tokens, plans, tail, n)) for n in (1, TIMED_ROWS))
    # Rows cost alike; what one row takes beyond that is the pass's own.
    unit = max(several - one, 0.2 * several) / (TIMED_ROWS - 1) / row
    own = max(one - unit * row, 0.0)
    why = reason or "cells share what comes before their edits"
    return Estimate(
        cells=len(plans), passes=work.passes, rows=work.rows, memory=need.of(work.rows),
        seconds=own * work.passes + unit * work.units,
        how="shared prefix" if shared else "plain batching", why=f"{why}; {fit.bound}",
    )  # fmt: skip


def _seconds(run: Callable[[], Tensor]) -> float:
    """The quicker of two calls, after one that is not counted; reading the result waits for it."""
    times = []
    for _ in range(3):
        start = perf_counter()
        run().sum().item()
        times.append(perf_counter() - start)
    return min(times[1:])
