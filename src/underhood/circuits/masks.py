"""Trained masks over the edges or nodes of a circuit graph.

Every edge (or node) gets a weight between 0, where it carries the other run's value, and 1, where
it carries this pass's own; `mask_trainer` lowers a loss and the price of what is kept together.
Scores of single edges do not know what happens when the others are cut too; a mask does.

Sources: subnetwork probing over edges (Cao et al., 2021; Miller et al., 2024), Edge Pruning
(Bhaskar et al., 2024), UGS (Li and Janson, 2024). Ours: one draw of the mask for each prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from underhood.circuits.ablation import Ablation, cutting
from underhood.circuits.circuit import Circuit, Scores
from underhood.circuits.gradients import frozen
from underhood.circuits.mask_trainer import (
    KINDS,
    Recipe,
    Trained,
    odds_from_scores,
    train_masks,
)  # fmt: skip
from underhood.circuits.wiring import BUDGET, Wiring, Writes, last_logits
from underhood.core.errors import UsageError
from underhood.data import EncodedPairs, Metric, kl, log_prob

__all__ = [
    "KINDS", "LEVELS", "LOSSES", "CircuitMasks", "Recipe", "Trained", "circuit_masks",
    "odds_from_scores", "train_masks",
]  # fmt: skip

LEVELS = ("edge", "node")
LOSSES = ("kl", "metric", "answer")


@dataclass(frozen=True, eq=False)
class CircuitMasks:
    """What `circuit_masks` found.

    Attributes:
        circuit: What is kept, without what leads nowhere.
        scores: For every edge how much it is kept, above 0: softplus of the log-odds. They rank.
        trained: The mask itself: one part per edge (in the order of `graph.real.nonzero()`), or one
            per source but the input.
    """

    circuit: Circuit
    scores: Scores
    trained: Trained


@dataclass
class _Cutting:
    """The loss of a graph's mask."""

    wiring: Wiring
    pairs: EncodedPairs
    metric: Metric
    level: str
    ablation: str
    targets: Float[Tensor, "row vocab"] | None
    batch: int
    reference: Tensor = field(init=False)
    held: Writes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        blocks = self.pairs.blocks(self.batch)
        model = self.wiring.model
        self.cut = Ablation(self.wiring, self.pairs, self.ablation, self.batch)
        found = [last_logits(model, self.pairs.clean.rows(block))[0] for block in blocks]
        self.reference = torch.cat(found)
        columns, width = self.pairs.clean.ids.shape[1], model.d_model or 1
        if len(self.pairs) * columns * width * 4 * len(self.wiring.graph.writers) < BUDGET // 4:
            each = [self.cut.writes(self.pairs.rows(block)) for block in blocks]
            values = [torch.cat(parts) for parts in zip(*(w.values for w in each), strict=True)]
            self.held = Writes(values, torch.cat([w.logits for w in each]))

    def keep(self, values: Tensor) -> Tensor:
        """A weight for every pair of source and destination."""
        real = self.wiring.graph.real
        if self.level == "node":
            input_ = values.new_ones(*values.shape[:-1], 1)
            rows = torch.cat([input_, values], -1)[..., None]
            return rows.expand(*values.shape[:-1], *real.shape)
        numbers = real.flatten().nonzero()[:, 0].to(values.device)
        flat = values.new_zeros(*values.shape[:-1], real.numel())
        return flat.index_copy(-1, numbers, values).unflatten(-1, real.shape)

    def __call__(self, values: Tensor, index: Sequence[int]) -> Tensor:
        rows = self.pairs.rows(list(index))
        other = self.cut.writes(rows) if self.held is None else self.held.rows(list(index))
        grad = torch.is_grad_enabled()
        with frozen(self.wiring.model.module):
            logits = self.wiring.logits(rows.clean, other, self.keep(values), grad=grad)
        if self.targets is not None:
            wanted = self.targets[list(index)].to(logits.device)
            return -(wanted * logits.float().log_softmax(-1)).sum(-1).mean()
        answers, wrong = rows.answers.to(logits.device), rows.wrong.to(logits.device)
        reference = self.reference[list(index)] if self.metric.uses_reference else None
        return -self.metric(logits, answers, wrong, reference=reference).mean()


def circuit_masks(
    wiring: Wiring,
    pairs: EncodedPairs,
    metric: Metric,
    recipe: Recipe | None = None,
    *,
    level: str = "edge",
    loss: str = "kl",
    ablation: str = "resample",
    init: Scores | None = None,
    targets: Float[Tensor, "row vocab"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CircuitMasks:
    """The edges or nodes that a trained mask keeps.

    Args:
        wiring: The model and its graph.
        pairs: The prompts.
        metric: For loss "metric", what is driven up.
        recipe: How masks are trained.
        level: "edge", or "node": a head or MLP is cut for all its readers at once. The input is no
            part at level "node": it is always kept.
        loss: "kl" to the whole model's distribution; "metric", minus the metric (it has no lower
            end: parts that work against the answer are cut too); "answer", the cross-entropy of the
            answers.
        ablation: What cut edges carry.
        init: Scores to start from (such as EAP-IG's): log-odds by size, `recipe.start` of the parts
            kept (0.2 if it is not given); a node's size is that of the sum over its edges.
        targets: Next-token distributions to reach instead of `loss`, one per prompt.
        progress: Called with the steps done and the steps in all.

    Raises:
        UsageError: An unknown level or loss, or a metric without a gradient.

    Cost: about three forwards for each step's rows; one forward over all rows and their contrasts.
    """
    recipe = recipe or Recipe()
    measure = _measure(metric, level, loss)
    objective = _Cutting(wiring, pairs, measure, level, ablation, targets, recipe.batch)
    graph, real = wiring.graph, wiring.graph.real
    odds = None
    if init is not None:
        size = init.values[real].abs() if level == "edge" else init.values.sum(1)[1:].abs()
        odds = odds_from_scores(size, 0.2 if recipe.start is None else recipe.start)
    parts = int(real.sum()) if level == "edge" else len(graph.sources) - 1
    trained = train_masks(
        objective, parts, len(pairs), recipe, odds=odds, per_row=True,
        device=wiring.model.device, progress=progress,
    )  # fmt: skip
    how = {
        "method": f"{level} mask", "kind": recipe.kind, "prompts": len(pairs),
        "loss": loss if targets is None else "targets", "seed": recipe.seed,
        **cutting(wiring, ablation),
    }  # fmt: skip
    rank = torch.nn.functional.softplus(trained.rank)
    scores = objective.keep(rank) * real
    kept = objective.keep(trained.kept.float()).bool() & real
    return CircuitMasks(Circuit(graph, kept, how).pruned(), Scores(graph, scores, how), trained)


def _measure(metric: Metric, level: str, loss: str) -> Metric:
    if level not in LEVELS or loss not in LOSSES:
        raise UsageError(
            "no such mask over a graph",
            given=f"level={level}, loss={loss}",
            do=f"use level {', '.join(LEVELS)} and loss {', '.join(LOSSES)}",
        )
    measure = {"kl": kl, "metric": metric, "answer": log_prob}[loss]
    if not measure.differentiable:
        raise UsageError(
            f"{measure.name} has no gradient",
            given=f"loss={loss}, metric={measure.name}",
            do="use loss='kl', or metric='logit_diff'",
        )
    return measure
