"""Desiderata masks (DCM): the few heads that carry a change over from the contrast's run.

In the clean run, at one position, each head's output is mixed with what it is in the contrast's:

    z_h  <-  (1 - g_h) z_h(now) + g_h z_h(contrast)

and the shares g are trained so that the run says what the contrast calls for, with few heads mixed.
"Now": heads that are not mixed still answer to earlier ones that are, as in DCM's own code.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.gradients import frozen
from underhood.circuits.wiring import last_logits
from underhood.core.edit import Edit, Plan
from underhood.core.errors import NotOffered, UsageError
from underhood.core.model import Model
from underhood.core.ops import call
from underhood.core.site import Site
from underhood.core.sweep import sweep
from underhood.data import EncodedPairs, Metric, Pairs, kl, log_prob
from underhood.methods.locate._interchange import Interchange, spots

__all__ = ["Carrying"]


class Carrying:
    """Heads exchanged between the two runs of some pairs, at one position of each.

    Args:
        model: The model.
        pairs: The pairs as they were given, for the names of positions.
        encoded: Those of them that count here.
        position: "last", "changed", a number, or the name of a word.
        metric: What is measured.
        batch_size: Rows of one pass of the exact exchanges.

    Attributes:
        heads: Site of every head, layer by layer.
        clean, contrast: The metric of both runs.

    Raises:
        NotOffered: The model has no heads.
        UsageError: A position that is not one place of each row.
    """

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        encoded: EncodedPairs,
        *,
        position: str,
        metric: Metric,
        batch_size: int | None = None,
    ) -> None:
        where = spots(encoded, pairs, position)
        if where is None:
            raise UsageError(
                "heads are exchanged at one position of each prompt",
                given=f"position={position}",
                do='use "last", "changed", a number, or the name of a word',
            )
        self.model, self.pairs, self.metric, self.batch_size = model, encoded, metric, batch_size
        self.heads = _heads(model)
        self.work = Interchange(model, encoded, self.heads, where)
        ends = [last_logits(model, tokens)[0] for tokens in (encoded.clean, encoded.contrast)]
        self.whole, self.there = (logits.detach() for logits in ends)
        self.clean, self.contrast = (self._read(x) for x in (self.whole, self.there))

    def _read(self, logits: Tensor) -> Float[Tensor, " row"]:
        """The metric in float64; `logits` are cell by cell all rows."""
        times = len(logits) // len(self.pairs)
        answers, wrong = (x.repeat(times, 1) for x in (self.pairs.answers, self.pairs.wrong))
        kept = self.whole.repeat(times, 1) if self.metric.uses_reference else None
        return self.metric(logits, answers, wrong, reference=kept).double().cpu()

    # Exact ---------------------------------------------------------------------------------------

    def moved(self, sets: Sequence[Sequence[int]]) -> Float[Tensor, " set"]:
        """How far each set of heads takes the metric: 0 as the clean run, 1 as the contrast's."""
        found = torch.zeros(len(sets), dtype=torch.float64)
        full = [i for i, heads in enumerate(sets) if len(heads)]
        if not full:
            return found
        cells = [
            Plan(edit for head in sets[i] for edit in self.work.swap(self.heads[head], None))
            for i in full
        ]
        values = sweep(
            self.model, self.pairs.clean, cells, self._read, batch_size=self.batch_size
        ).values  # fmt: skip
        way = float((self.clean - self.contrast).mean())
        if abs(way) < 1e-6 * max(1.0, float(self.clean.abs().mean())):
            raise UsageError(
                "both runs have the same metric, so that nothing can be carried over",
                given=f"{self.metric.name} {float(self.clean.mean()):+.4g} in both",
                do="use a contrast that changes the answer",
            )
        found[full] = (self.clean[None] - values.double().cpu()).mean(1) / way
        return found

    # Trained -------------------------------------------------------------------------------------

    def objective(self, loss: str) -> Callable[[Tensor, Sequence[int]], Tensor]:
        """The loss of shares `[head]` or `[row head]`: how far the run is from the contrast's.

        "answer": cross-entropy of the contrast's answer. "metric": the metric with right and wrong
        answers exchanged, driven up ("logit": minus the logit of the contrast's answer, as DCM has
        it). "kl": KL from the contrast's run.
        """
        measure = {"kl": kl, "answer": log_prob, "metric": self.metric}[loss]

        def objective(values: Tensor, index: Sequence[int]) -> Tensor:
            rows = self.pairs.rows(list(index))
            grad = torch.is_grad_enabled()
            with frozen(self.model.module):
                edits = self.edits(values, list(index))
                logits = last_logits(self.model, rows.clean, edits, grad=grad)[0]
            answers, wrong = rows.wrong.to(logits.device), rows.answers.to(logits.device)
            reference = self.there[list(index)] if measure.uses_reference else None
            return -measure(logits, answers, wrong, reference=reference).mean()

        return objective

    def edits(self, values: Tensor, index: Sequence[int]) -> list[Edit]:
        """Edits that mix every head by its share."""
        layers: dict[Site, list[int]] = {}
        for number, site in enumerate(self.heads):
            layers.setdefault(site.whole, []).append(number)
        found = []
        for site, numbers in layers.items():
            source = torch.stack([self.work.source[self.heads[n]][index] for n in numbers], 1)
            share = values[..., numbers[0] : numbers[-1] + 1]  # heads of a layer lie side by side
            for where, rows in self.work.places(index):
                # An edit of some rows is handed these rows only.
                mine = share[rows] if share.ndim == 2 else share
                found.append(Edit(site, call(_mix(source[rows, None], mine[..., None])), where))
        return found


def _mix(source: Tensor, share: Tensor) -> Callable[[Tensor], Tensor]:
    def mix(now: Tensor) -> Tensor:
        # [rows 1 head d_head] against [rows pos head d_head]; a share of all rows, or of each
        part = share[:, None] if share.ndim == 3 else share
        return now + part.to(now) * (source.to(now) - now)

    return mix


def _heads(model: Model) -> list[Site]:
    found = []
    for layer in range(model.n_layers):
        site = Site("z", layer, stack=model.main)
        if model.offers(site):
            count = model.size(site, "head") or 0
            found += [Site("z", layer, head, stack=model.main) for head in range(count)]
    if not found:
        raise NotOffered("this model has no heads", given=repr(model), do="use level='edge'")
    return found
