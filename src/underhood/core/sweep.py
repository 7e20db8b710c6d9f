"""Sweeps: many single edits on the same prompts as one job.

A cell is one edit (or a plan of several) applied to all prompts; a sweep runs every cell by itself
and reads one number per cell and prompt. The rows of one big batch are cells x prompts, cell by
cell; each cell's edits see their own rows and nothing else, so the result equals the loop

    for cell in cells:
        read(model.run(tokens, edits=cell).last_logits)

within float noise. Where the model allows it, cells share what they have in common
(`core.growing`); else every row is run whole. Only the logits at each row's last token are computed
where the model can. Cells that are known to change nothing are for the caller to leave out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Fired, Plan, as_plan, in_rows
from underhood.core.errors import EditNeverFired, NotFinite, OutOfRange, ShapeMismatch, UsageError
from underhood.core.growing import CannotShare, Growing, groups, why_not
from underhood.core.model import Model
from underhood.core.run import Run
from underhood.core.taps import Session
from underhood.core.taps.patches import evaluating
from underhood.core.tokens import Tokens

__all__ = ["Swept", "rows_per_pass", "sweep"]

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
    progress: Callable[[int, int], None] | None = None,
) -> Swept:
    """One number per cell and prompt, each cell run by itself.

    Args:
        model: The model.
        tokens: The prompts.
        cells: What to change, cell by cell. Values of a patch have one row, or one per prompt (or
            one per row that the edit's `where.rows` names).
        read: From logits `[cells * prompts, vocab]` at each prompt's last token (cell by cell, all
            prompts of a cell in order) to one number per row.
        batch_size: Rows of one pass; default `rows_per_pass`.
        share: Use the shared-prefix engine (`core.growing`) where the model allows it; else, and
            where it does not, rows are batched plainly, and `how` says why.
        progress: Called after each pass with the cells done and the cells in all.

    Raises:
        UsageError: No cells, an empty cell, or an edit that cannot be met; before any forward.
        EditNeverFired: An edit that acted nowhere; the message names the cell.
        NotFinite: Logits or readings that are not numbers.
        ShapeMismatch: `read` returned something other than one number per row.

    Cost: cells * prompts rows, in passes of `batch_size`, from each cell's first edit on where rows
        share their prefix, else whole; no backward.
    """
    plans = _checked(model, tokens, cells)
    size = rows_per_pass(tokens.ids.shape[1]) if batch_size is None else batch_size
    if size < 1:
        raise OutOfRange("a pass needs at least one row", given=size, do="batch_size=1 or more")
    reason = why_not(model, plans, tokens.lengths) if share else "asked for"
    if reason is None:
        try:
            return _shared(model, tokens, plans, read, size, progress)
        except CannotShare as found:
            reason = str(found)
    batch, each = len(tokens), max(1, size // len(tokens))
    job = _Job(model, tokens, plans)
    values: list[Tensor] = []
    for first in range(0, len(plans), each):
        chosen = range(first, min(first + each, len(plans)))
        parts = [job.logits(chosen, rows) for rows in _blocks(batch, size)]
        _check_fired(chosen, plans, job.places)
        values.append(_read(read, torch.cat(parts), chosen, batch))
        if progress is not None:
            progress(chosen.stop, len(plans))
    how = f"plain batching, {min(size, each * batch)} rows a pass ({reason})"
    return Swept(torch.cat(values), how, job.passes, job.moved)


def _checked(model: Model, tokens: Tokens, cells: Sequence[Edit | Plan]) -> list[Plan]:
    """The cells as concrete plans; every refusal that needs no forward."""
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
    return plans


def _blocks(batch: int, size: int) -> Iterator[range]:
    """Rows of the prompts that go into one pass."""
    return (range(i, min(i + size, batch)) for i in range(0, batch, size))


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


class _Job:
    """The passes of one sweep."""

    def __init__(self, model: Model, tokens: Tokens, plans: list[Plan]) -> None:
        self.model, self.tokens, self.plans, self.passes = model, tokens, plans, 0
        self.places: Counter[tuple[int, int]] = Counter()
        self.moved = torch.zeros(len(plans))
        # The logits themselves, and modules that may be the head, must be as they always are.
        edits = [edit for plan in plans for edit in plan]
        sites = [e.site for e in edits] + [e.gate.site for e in edits if e.gate is not None]
        plain = not any(site.path or site.name == "logits" for site in sites)
        self.tail_only = plain and "logits_to_keep" in signature(model.module.forward).parameters

    def logits(self, cells: range, rows: range) -> Float[Tensor, "rows vocab"]:
        """Logits at the last token of some prompts under some cells, cell by cell."""
        cut = slice(rows.start, rows.stop)
        block = Tokens(self.tokens.ids[cut], self.tokens.mask[cut])
        edits: dict[tuple[int, int], Edit] = {}
        for index, cell in enumerate(cells):
            for number, edit in enumerate(self.plans[cell]):
                placed = in_rows(edit, rows, index * len(rows), len(self.tokens))
                edits |= {(cell, number): placed} if placed is not None else {}
        output, fired = self._pass(block.repeat(len(cells)), list(edits.values()))
        for (cell, number), entry in zip(edits, fired, strict=True):
            self.places[cell, number] += entry.places
            self.moved[cell] = max(float(self.moved[cell]), entry.moved)
        _check_finite(output, cells, len(rows), self.plans)
        return output

    def _pass(self, tokens: Tokens, edits: list[Edit]) -> tuple[Tensor, list[Fired]]:
        """One forward: logits at each row's last token, and what the edits did."""
        model = self.model
        _, given = model.batch(tokens)
        last = torch.tensor([a + b - 1 for a, b in zip(tokens.starts, tokens.lengths, strict=True)])
        skipped = int(last.min()) if self.tail_only else 0
        if self.tail_only:
            given = given | {"logits_to_keep": tokens.ids.shape[1] - skipped}
        session = Session(model.module, model.anatomy, Plan(edits))
        with evaluating(model.module), torch.no_grad(), session:
            output = Run(tokens, model._forward(given)).logits
        self.passes += 1
        last = (last - skipped).to(output.device)
        found = output[torch.arange(len(last), device=output.device), last]
        return found, session.close_report(must_fire=False)


def _check_fired(cells: Sequence[int], plans: list[Plan], places: Counter[tuple[int, int]]) -> None:
    """Refuse cells with an edit that acted in no pass."""
    for cell in cells:
        for number, edit in enumerate(plans[cell]):
            if not places[cell, number]:
                raise EditNeverFired(
                    "an edit of the sweep acted nowhere",
                    given=f"cell {cell}: {edit!r}",
                    why="no position of the prompts met its conditions",
                    do="check its site, positions and gate, or leave the cell out",
                )


def _shared(
    model: Model,
    tokens: Tokens,
    plans: list[Plan],
    read: Read,
    size: int,
    progress: Callable[[int, int], None] | None,
) -> Swept:
    """The sweep by the shared-prefix engine, prompt by prompt within each group of cells."""
    job = Growing(model, tokens, plans)
    values = torch.zeros(0)
    done = 0
    for cells in groups(plans, tokens.lengths[0], model.n_layers, size):
        each = torch.stack([job.logits(cells, i) for i in range(len(tokens))], 1)
        _check_finite(each.flatten(0, 1), cells, len(tokens), plans)
        _check_fired(cells, plans, job.places)
        found = _read(read, each.flatten(0, 1), cells, len(tokens))
        if not done:
            values = found.new_zeros(len(plans), len(tokens))
        values[list(cells)] = found
        done += len(cells)
        if progress is not None:
            progress(done, len(plans))
    how = f"shared prefix: {job.passes} passes, each layer walked once by a growing batch"
    return Swept(values, how, job.passes, job.moved)
