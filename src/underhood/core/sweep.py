"""Sweeps: many single edits on the same prompts as one job.

A cell is one edit (or a plan of several) applied to all prompts; a sweep runs every cell by itself
and reads one number per cell and prompt. The rows of one big batch are cells x prompts, cell by
cell; each cell's edits see their own rows and nothing else, so the result equals the loop

    for cell in cells:
        read(model.run(tokens, edits=cell).last_logits)

within float noise. Only the logits at each row's last token are computed where the model allows it.

What this does not do yet: resume at the edited layer, share the prefix before the edited position.
Cells that are known to change nothing are for the caller to leave out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Fired, Plan, as_plan, replace_edit
from underhood.core.errors import EditNeverFired, NotFinite, OutOfRange, ShapeMismatch, UsageError
from underhood.core.model import Model
from underhood.core.run import Run
from underhood.core.taps import Session
from underhood.core.tokens import Tokens, Where

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
        progress: Called after each pass with the cells done and the cells in all.

    Raises:
        UsageError: No cells, an empty cell, or an edit that cannot be met; before any forward.
        EditNeverFired: An edit that acted nowhere; the message names the cell.
        NotFinite: Logits or readings that are not numbers.
        ShapeMismatch: `read` returned something other than one number per row.

    Cost: cells * prompts rows, in passes of `batch_size`; no backward.
    """
    plans = _checked(model, tokens, cells)
    size = rows_per_pass(tokens.ids.shape[1]) if batch_size is None else batch_size
    if size < 1:
        raise OutOfRange("a pass needs at least one row", given=size, do="batch_size=1 or more")
    batch, each = len(tokens), max(1, size // len(tokens))
    job = _Job(model, tokens, plans)
    values: list[Tensor] = []
    for first in range(0, len(plans), each):
        chosen = range(first, min(first + each, len(plans)))
        parts = [job.logits(chosen, rows) for rows in _blocks(batch, size)]
        job.check_fired(chosen)
        values.append(_read(read, torch.cat(parts), chosen, batch))
        if progress is not None:
            progress(chosen.stop, len(plans))
    how = f"plain batching: {min(size, each * batch)} rows a pass, every layer of every row"
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


def _read(read: Read, logits: Tensor, cells: range, batch: int) -> Float[Tensor, "cell batch"]:
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
                placed = self._placed(edit, rows, index * len(rows))
                edits |= {(cell, number): placed} if placed is not None else {}
        output, fired = self._pass(block.repeat(len(cells)), list(edits.values()))
        for (cell, number), entry in zip(edits, fired, strict=True):
            self.places[cell, number] += entry.places
            self.moved[cell] = max(float(self.moved[cell]), entry.moved)
        finite = torch.isfinite(output).all(1)
        if not bool(finite.all()):
            cell = cells[int((~finite).nonzero()[0]) // len(rows)]
            raise NotFinite(
                "the model's output is not finite",
                given=f"cell {cell}: {self.plans[cell]!r}",
                do="check the edit's strength and the precision",
            )
        return output

    def _placed(self, edit: Edit, rows: range, offset: int) -> Edit | None:
        """The edit at its rows of a pass; None when it concerns none of them."""
        batch, named = len(self.tokens), edit.where.rows
        own = list(range(batch)) if named is None else sorted({r % batch for r in named})
        index = [i for i, row in enumerate(own) if row in rows]
        if not index:
            return None
        taken, op = torch.tensor([own[i] for i in index]), edit.op
        if len(index) < batch:
            site = edit.site
            ndim = 3 if site.path else len(site.kind.axes) - (site.unit is not None)
            op = op.of_rows(taken, batch, ndim)
            op = op.of_rows(torch.tensor(index), len(own), ndim) if op is edit.op else op
        spots = (taken - rows.start + offset).tolist()
        where = edit.where
        there = Where(
            where.pos, rows=spots, tokens=where.tokens, phase=where.phase, steps=where.steps
        )
        return replace_edit(edit, op=op, where=there)

    def _pass(self, tokens: Tokens, edits: list[Edit]) -> tuple[Tensor, list[Fired]]:
        """One forward: logits at each row's last token, and what the edits did."""
        model = self.model
        _, given = model.batch(tokens)
        last = torch.tensor([a + b - 1 for a, b in zip(tokens.starts, tokens.lengths, strict=True)])
        skipped = int(last.min()) if self.tail_only else 0
        if self.tail_only:
            given = given | {"logits_to_keep": tokens.ids.shape[1] - skipped}
        session = Session(model.module, model.anatomy, Plan(edits))
        with model._evaluating(), torch.no_grad(), session:
            output = Run(tokens, model._forward(given)).logits
        self.passes += 1
        last = (last - skipped).to(output.device)
        found = output[torch.arange(len(last), device=output.device), last]
        return found, session.close_report(must_fire=False)

    def check_fired(self, cells: range) -> None:
        """Refuse cells with an edit that acted in no pass."""
        for cell in cells:
            for number, edit in enumerate(self.plans[cell]):
                if not self.places[cell, number]:
                    raise EditNeverFired(
                        "an edit of the sweep acted nowhere",
                        given=f"cell {cell}: {edit!r}",
                        why="no position of the prompts met its conditions",
                        do="check its site, positions and gate, or leave the cell out",
                    )
