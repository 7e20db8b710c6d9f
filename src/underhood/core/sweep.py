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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.edit import Edit, Fired, Plan, as_plan, replace_edit
from underhood.core.errors import EditNeverFired, NotFinite, OutOfRange, ShapeMismatch, UsageError
from underhood.core.model import Model
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
        moved: ‖dh‖ / ‖h‖ over the places where the cell acted (with several edits, the largest).
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
    values, moved = [], []
    for first in range(0, len(plans), each):
        chosen = range(first, min(first + each, len(plans)))
        parts = [job.logits(chosen, rows) for rows in _blocks(batch, size)]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        values.append(_read(read, logits, chosen, batch))
        moved.append(job.moved(chosen))
        if progress is not None:
            progress(chosen.stop, len(plans))
    how = f"plain batching: {min(size, batch * each)} rows a pass, every layer of every row"
    return Swept(torch.cat(values), how, job.passes, torch.cat(moved))


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
        self.model, self.plans, self.passes = model, plans, 0
        self.tokens = Tokens(tokens.ids, tokens.mask)
        self.fired: dict[int, list[list[Fired]]] = {}
        starts, lengths = torch.tensor(tokens.starts), torch.tensor(tokens.lengths)
        self.last: Int[Tensor, " batch"] = starts + lengths - 1

    def logits(self, cells: range, rows: range) -> Float[Tensor, "rows vocab"]:
        """Logits at the last token of some prompts under some cells, cell by cell."""
        block = Tokens(self.tokens.ids[rows.start : rows.stop], self.tokens.mask[rows.start : rows.stop])
        edits, owners = [], []
        for index, cell in enumerate(cells):
            for edit in self.plans[cell]:
                mine = self._placed(edit, rows, index * len(rows))
                if mine is not None:
                    edits.append(mine)
                    owners.append(cell)
        big, last = block.repeat(len(cells)), self.last[rows.start : rows.stop].repeat(len(cells))
        run = self.model.run(big, edits=edits)
        self.passes += 1
        for cell, fired in zip(owners, run.fired, strict=True):
            self.fired.setdefault(cell, []).append([fired])
        return run.logits[torch.arange(len(big)), last.to(run.logits.device)]

    def moved(self, cells: range) -> Float[Tensor, " cell"]:
        raise NotImplementedError
