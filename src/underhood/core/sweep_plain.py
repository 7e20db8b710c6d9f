"""Plain batching: every row of a sweep run whole, many rows a pass; works for every model."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.core.edit import Edit, Fired, Plan, in_rows
from underhood.core.model import Model
from underhood.core.run import Run
from underhood.core.sweep_tail import Tail
from underhood.core.taps import Session
from underhood.core.taps.patches import evaluating
from underhood.core.tokens import Tokens

__all__ = ["Plain", "edits_logits"]


def edits_logits(plans: Sequence[Plan]) -> bool:
    """Whether cells touch the logits themselves, or modules that may be the head."""
    edits = [edit for plan in plans for edit in plan]
    sites = [e.site for e in edits] + [e.gate.site for e in edits if e.gate is not None]
    return any(site.path or site.name == "logits" for site in sites)


class Plain:
    """The passes of one plainly batched sweep.

    Args:
        model: The model.
        tokens: The prompts.
        plans: The cells, concrete.
        tail: Which logits are made; default all.
        before: Called before each forward; it may raise.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        plans: Sequence[Plan],
        *,
        tail: Tail | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.tokens, self.plans, self.passes = model, tokens, plans, 0
        self.tail, self._before = tail or Tail(model), before or (lambda: None)
        self.places: Counter[tuple[int, int]] = Counter()
        self.moved = torch.zeros(len(plans))
        # Where the logits are edited they must be as they always are.
        self.tail_only = "logits_to_keep" in model.forward_names and not edits_logits(plans)

    def logits(self, cells: Sequence[int], rows: range) -> Float[Tensor, "rows column"]:
        """Logits at the last token of some prompts under some cells, cell by cell."""
        block = self.tokens.rows(rows)
        edits: dict[tuple[int, int], Edit] = {}
        for index, cell in enumerate(cells):
            for number, edit in enumerate(self.plans[cell]):
                placed = in_rows(edit, rows, index * len(rows), len(self.tokens))
                edits |= {(cell, number): placed} if placed is not None else {}
        output, fired = self._pass(block.repeat(len(cells)), list(edits.values()))
        for (cell, number), entry in zip(edits, fired, strict=True):
            self.places[cell, number] += entry.places
            self.moved[cell] = max(float(self.moved[cell]), entry.moved)
        return output

    def _pass(self, tokens: Tokens, edits: list[Edit]) -> tuple[Tensor, list[Fired]]:
        """One forward: logits at each row's last token, and what the edits did."""
        self._before()
        model = self.model
        _, given = model.batch(tokens)
        last = torch.tensor([a + b - 1 for a, b in zip(tokens.starts, tokens.lengths, strict=True)])
        skipped = int(last.min()) if self.tail_only else 0
        if self.tail_only:
            given = given | {"logits_to_keep": tokens.ids.shape[1] - skipped}
        session = Session(model.module, model.anatomy, Plan(edits))
        with evaluating(model.module), torch.no_grad(), self.tail.narrowed(), session:
            output = Run(tokens, model._forward(given)).logits
        self.passes += 1
        last = (last - skipped).to(output.device)
        found = output[torch.arange(len(last), device=output.device), last]
        return self.tail.pick(found), session.close_report(must_fire=False)
