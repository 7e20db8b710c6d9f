"""Sweeps: many single edits on the same prompts as one job.

A cell is one edit (or a plan of several) applied to all prompts; a sweep runs every cell by itself
and reads one number per cell and prompt. The rows of one big batch are cells x prompts, cell by
cell; each cell's edits see their own rows and nothing else, so the result equals the loop

    for cell in cells:
        read(model.run(tokens, edits=cell).last_logits)

within float noise. Where the model allows it, cells share what they have in common
(`core.growing`); else every row is run whole (`core.sweep_plain`). Only the logits at each row's
last token are computed where the model can, and of those only the columns that are read, where the
caller names them (`core.sweep_tail`). Passes are as big as memory allows (`core.sweep_size`); what
is done can be kept in a file (`core.sweep_store`), and a stopped sweep goes on from it. Cells that
are known to change nothing are for the caller to leave out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Plan, as_plan
from underhood.core.errors import (
    EditNeverFired,
    NotFinite,
    OutOfRange,
    ShapeMismatch,
    Stopped,
    UsageError,
)
from underhood.core.growing import CannotShare, Growing, groups, pays, why_not
from underhood.core.model import Model
from underhood.core.sweep_plain import Plain, edits_logits
from underhood.core.sweep_size import Estimate, Fit, estimated, fitting
from underhood.core.sweep_store import Kept, Store, identify
from underhood.core.sweep_tail import Tail
from underhood.core.sweep_watch import Cancel, Cancelled, Progress, Watch, current_watch, patient
from underhood.core.sweep_watch import watched as watched
from underhood.core.tokens import Tokens

__all__ = ["Estimate", "Swept", "estimate", "rows_per_pass", "sweep", "watched"]

ROWS = 64
COLUMNS = 8192  # rows x columns of one pass

Read = Callable[[Tensor], Tensor]
"""From logits `[rows, vocab]` at the last token to one number per row."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found.

    Attributes:
        values: What `read` returned.
        how: How it was computed, in words.
        passes: Forward passes.
        moved: ‖dh‖ / ‖h‖ over the places where the cell acted (the largest, where a cell
            holds several edits or took several passes).
    """

    values: Float[Tensor, "cell batch"]
    how: str
    passes: int
    moved: Float[Tensor, " cell"]


def rows_per_pass(columns: int) -> int:
    """Rows of one pass by default: 64, fewer for long prompts (8,192 tokens a pass)."""
    return max(1, min(ROWS, COLUMNS // max(columns, 1)))


def sweep(
    model: Model,
    tokens: Tokens,
    cells: Sequence[Edit | Plan],
    read: Read,
    *,
    batch_size: int | None = None,
    share: bool = True,
    progress: Progress | None = None,
    columns: Tensor | None = None,
    memory: int | None = None,
    store: str | Path | None = None,
    cancel: Cancel | None = None,
) -> Swept:
    """One number per cell and prompt, each cell run by itself.

    Args:
        model: The model.
        tokens: The prompts.
        cells: What to change, cell by cell. Values of a patch have one row, or one per prompt (or
            one per row that the edit's `where.rows` names).
        read: From logits `[cells * prompts, vocab]` at each prompt's last token (cell by cell, all
            prompts of a cell in order) to one number per row.
        batch_size: Rows of one pass at the most; default `rows_per_pass`. Fewer where memory is
            short.
        share: Use the shared-prefix engine (`core.growing`) where the model allows it; else, and
            where it does not, rows are batched plainly, and `how` says why.
        progress: Called after each pass with the cells done and the cells in all.
        columns: Ids of the vocabulary that `read` needs; it then gets logits `[rows, len(columns)]`
            in their order, and where the head is a plain linear map no others are computed.
        memory: Bytes that a pass may take beside the weights; default half of what is free.
        store: A file (or a folder, where each sweep gets its own file) that keeps what is done: the
            same call goes on where a stopped one was. Not for cells with Python functions. `read`
            is called once more, on made-up logits, to be recognised.
        cancel: Asked before each pass; stops the sweep.

    Raises:
        UsageError: No cells, an empty cell, or an edit that cannot be met; before any forward.
        EditNeverFired: An edit that acted nowhere; the message names the cell.
        NotFinite: Logits or readings that are not numbers.
        ShapeMismatch: `read` returned something other than one number per row.
        MemoryTooSmall: Not even one row fits.
        FileProblem: `store` belongs to another sweep, is damaged, or cannot be written.
        Stopped: By `cancel` or from the keyboard. Cells of passes that were complete are in
            `store`; a group of cells under way is lost.

    Cost: cells * prompts rows, in passes of `batch_size`, from each cell's first edit on where rows
        share their prefix, else whole; no backward. Short forwards besides: two, once per model,
        with `columns`; two with `memory`, or when memory may be short.
    """
    plans, size = _checked(model, tokens, cells, batch_size, memory)
    watch = current_watch().also(progress, cancel)
    if watch.dry:
        found = estimate(
            model, tokens, cells, batch_size=batch_size, share=share, columns=columns, memory=memory
        )
        for tell in watch.dry:
            tell(found)
        return _unedited(model, tokens, len(plans), read, columns)
    kept = _kept(model, tokens, plans, read, columns, store, watch.folder)
    job = _Sweep(model, tokens, plans, read, watch, kept)
    try:
        with patient() as job.interrupted:
            tail = Tail(model, columns, whole=edits_logits(plans))
            return job.run(tail, size, share=share, memory=memory)
    except (KeyboardInterrupt, Cancelled) as stop:
        raise job.stopped(stop) from stop


def _unedited(
    model: Model, tokens: Tokens, cells: int, read: Read, columns: Tensor | None
) -> Swept:
    """The unedited run's reading for every cell: what a dry run goes on with."""
    logits = model.run(tokens).last_logits
    logits = logits if columns is None else logits[:, columns.to(logits.device)]
    values = _read(read, logits, [0], len(tokens))
    return Swept(values.repeat(cells, 1), "dry run: no cell was run", 0, torch.zeros(cells))


def estimate(
    model: Model,
    tokens: Tokens,
    cells: Sequence[Edit | Plan],
    *,
    batch_size: int | None = None,
    share: bool = True,
    columns: Tensor | None = None,
    memory: int | None = None,
) -> Estimate:
    """What a sweep would take, without running it: print it.

    Args:
        model: The model.
        tokens: The prompts.
        cells: What to change, cell by cell.
        batch_size: As in `sweep`.
        share: As in `sweep`.
        columns: As in `sweep`.
        memory: As in `sweep`.

    Raises:
        UsageError, OutOfRange, MemoryTooSmall: As `sweep` would.

    Cost: eight forwards of one to four rows.
    """
    plans, size = _checked(model, tokens, cells, batch_size, memory)
    tail = Tail(model, columns, whole=edits_logits(plans))
    fit = fitting(model, tokens, plans, tail, size, memory)
    reason = _why_plain(model, tokens, plans, fit.rows, share=share)
    return estimated(model, tokens, plans, tail, fit, reason)


def _why_plain(
    model: Model, tokens: Tokens, plans: Sequence[Plan], rows: int, *, share: bool
) -> str | None:
    """Why rows are run whole; None where they share their prefix."""
    if not share:
        return "asked for"
    reason = why_not(model, plans, tokens.lengths)
    if reason is None and not pays(plans, tokens.lengths, model.n_layers, rows):
        return "few cells for each of many prompts"
    return reason


def _kept(
    model: Model,
    tokens: Tokens,
    plans: list[Plan],
    read: Read,
    columns: Tensor | None,
    store: str | Path | None,
    folder: Path | None,
) -> Store | None:
    """The file that keeps what is done, if there is to be one."""
    place = store if store is not None else folder
    if place is None:
        return None
    try:
        parts = identify(model, tokens, plans, read, columns)
    except UsageError:
        if store is not None:
            raise
        return None  # whoever named the folder did not choose the cells
    return Store(place, parts, len(plans), len(tokens))


class _Sweep:
    """One sweep: its cells, and what is known of them so far."""

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        plans: list[Plan],
        read: Read,
        watch: Watch,
        store: Store | None,
    ) -> None:
        self.model, self.tokens, self.plans, self.read = model, tokens, plans, read
        self.watch, self.store = watch, store
        self.done: dict[int, Kept] = dict(store.done) if store is not None else {}
        self.resumed = len(self.done)
        self.interrupted: Callable[[], bool] = lambda: False

    def run(self, tail: Tail, size: int, *, share: bool, memory: int | None) -> Swept:
        """Run the cells that are not known yet."""
        todo = [cell for cell in range(len(self.plans)) if cell not in self.done]
        how, passes = "nothing to run", 0
        if todo:
            self._before()
            plans = [self.plans[cell] for cell in todo]
            fit = fitting(self.model, self.tokens, plans, tail, size, memory)
            reason = _why_plain(self.model, self.tokens, plans, fit.rows, share=share)
            if reason is None:
                try:
                    how, passes = self._shared(todo, tail, fit)
                except CannotShare as found:
                    reason = str(found)
            if reason is not None:
                # Also what the engine had done: a family that it cannot share is not trusted.
                self.done = {c: kept for c, kept in self.done.items() if c not in set(todo)}
                how, passes = self._plain(todo, tail, fit, reason)
        if self.resumed:
            how += f"; {self.resumed} of {len(self.plans)} cells from {self._name()}"
        rows = [self.done[cell] for cell in range(len(self.plans))]
        moved = torch.tensor([row.moved for row in rows])
        return Swept(torch.stack([row.values for row in rows]), how, passes, moved)

    def _shared(self, todo: list[int], tail: Tail, fit: Fit) -> tuple[str, int]:
        """By the shared-prefix engine, prompt by prompt within each group of cells."""
        plans = [self.plans[cell] for cell in todo]
        job = Growing(self.model, self.tokens, plans, tail=tail, before=self._before, room=fit.room)
        for cells in groups(plans, self.tokens.lengths[0], self.model.n_layers, fit.rows):
            each = [job.logits(cells, i) for i in range(len(self.tokens))]
            self._finish(todo, cells, torch.stack(each, 1).flatten(0, 1), job)
        how = f"shared prefix: {job.passes} passes, each layer walked once by a growing batch"
        return how + _told(tail), job.passes

    def _plain(self, todo: list[int], tail: Tail, fit: Fit, reason: str) -> tuple[str, int]:
        """Every row whole."""
        plans = [self.plans[cell] for cell in todo]
        job = Plain(self.model, self.tokens, plans, tail=tail, before=self._before)
        batch, size = len(self.tokens), fit.rows
        each = max(1, size // batch)
        blocks = self.tokens.blocks(size)
        for first in range(0, len(plans), each):
            cells = range(first, min(first + each, len(plans)))
            # Several blocks of prompts there are only where a pass holds a single cell.
            self._finish(todo, cells, torch.cat([job.logits(cells, rows) for rows in blocks]), job)
        how = f"plain batching, {min(size, each * batch)} rows a pass ({reason})"
        return how + _told(tail), job.passes

    def _finish(
        self, todo: list[int], cells: Sequence[int], logits: Tensor, job: Growing | Plain
    ) -> None:
        """Check, read and keep some cells; `cells` are numbers among `todo`."""
        real = [todo[cell] for cell in cells]
        _check_finite(logits, real, len(self.tokens), self.plans)
        _check_fired(cells, todo, self.plans, job.places)
        values = _read(self.read, logits, real, len(self.tokens))
        for cell, number, row in zip(cells, real, values, strict=True):
            self.done[number] = Kept(row, float(job.moved[cell]))
        if self.store is not None:
            self.store.add(real, values, [float(job.moved[cell]) for cell in cells])
        for progress in self.watch.progress:
            progress(len(self.done), len(self.plans))

    def _before(self) -> None:
        """Asked before every pass."""
        if self.interrupted():
            raise KeyboardInterrupt
        if self.watch.cancelled():
            raise Cancelled

    def _name(self) -> str:
        return self.store.path.name if self.store is not None else "nowhere"

    def stopped(self, stop: BaseException) -> Stopped:
        """The error that says how far the sweep came."""
        kept = self.store is not None
        error = Stopped(
            "the sweep was stopped",
            given=f"{len(self.done)} of {len(self.plans)} cells done",
            why="it was cancelled" if isinstance(stop, Cancelled) else "of an interrupt",
            do=f"make the same call again to go on: they are kept in {self._name()}"
            if kept
            else "give store=FILE next time, and the same call goes on where it was stopped",
        )
        error.done, error.total = len(self.done), len(self.plans)
        return error


def _told(tail: Tail) -> str:
    if tail.columns is None:
        return ""
    n = len(tail.columns)
    return f"; {n} columns of the logits" if tail.narrow else f"; all logits, {n} columns read"


def _checked(
    model: Model,
    tokens: Tokens,
    cells: Sequence[Edit | Plan],
    batch_size: int | None,
    memory: int | None,
) -> tuple[list[Plan], int]:
    """The cells as concrete plans, and rows of a pass; every refusal that needs no forward."""
    if not cells:
        raise UsageError("a sweep needs cells", given="none", do="give one edit or more")
    lengths = tokens.lengths
    plans = [model.plan(as_plan(cell), lengths=lengths, generating=False) for cell in cells]
    for number, plan in enumerate(plans):
        if not plan:
            raise UsageError(
                "a cell of the sweep holds no edit",
                given=f"cell {number} of {len(plans)}",
                do="leave it out; its value is that of the unedited run",
            )
    size = rows_per_pass(tokens.ids.shape[1]) if batch_size is None else batch_size
    if size < 1:
        raise OutOfRange("a pass needs at least one row", given=size, do="batch_size=1 or more")
    if memory is not None and memory < 1:
        raise OutOfRange("a pass needs memory", given=memory, do="give bytes, or leave it out")
    return plans, size


def _check_finite(logits: Tensor, cells: Sequence[int], each: int, plans: list[Plan]) -> None:
    """Refuse logits that are not numbers, naming the cell."""
    finite = torch.isfinite(logits).all(1)
    if not bool(finite.all()):
        cell = cells[int((~finite).nonzero()[0]) // each]
        raise NotFinite(
            "the model's output is not finite",
            given=f"cell {cell}: {plans[cell]!r}",
            do="check the edit's strength and the precision",
        )


def _read(
    read: Read, logits: Tensor, cells: Sequence[int], batch: int
) -> Float[Tensor, "cell batch"]:
    found = read(logits)
    if found.shape != (len(cells) * batch,):
        raise ShapeMismatch(
            "the reading must be one number per row",
            given=f"shape {list(found.shape)} for {len(cells) * batch} rows",
            do="return a tensor [rows]",
        )
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(found)).nonzero()[0])
        raise NotFinite(
            "a reading of the sweep is not finite",
            given=f"cell {cells[bad // batch]}, prompt {bad % batch}",
            do="check that edit's strength and the reading",
        )
    return found.view(len(cells), batch)


def _check_fired(
    cells: Sequence[int], todo: list[int], plans: list[Plan], places: Counter[tuple[int, int]]
) -> None:
    """Refuse cells with an edit that acted in no pass; `cells` are numbers among `todo`."""
    for cell in cells:
        for number, edit in enumerate(plans[todo[cell]]):
            if not places[cell, number]:
                raise EditNeverFired(
                    "an edit of the sweep acted nowhere",
                    given=f"cell {todo[cell]}: {edit!r}",
                    why="no position of the prompts met its conditions",
                    do="check its site, positions and gate, or leave the cell out",
                )
