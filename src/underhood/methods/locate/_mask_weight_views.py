"""What a weight mask does beside random masks of equal density: numbers and pictures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from underhood.circuits.masks import Trained
from underhood.methods.locate._mask_views import training_data, training_view
from underhood.methods.locate._mask_weights import Bigrams, Goal, Weights, correlation
from underhood.view import View, group, sentences, table

if TYPE_CHECKING:
    import xarray

__all__ = ["Judged", "judged", "weight_data", "weight_view"]

_WHAT = {
    "bigram": "cross-entropy with bigram probabilities",
    "kl": "KL from the whole model",
    "metric": "minus the metric",
    "answer": "cross-entropy of the answers",
}


@dataclass(frozen=True, slots=True)
class Judged:
    """A weight mask on prompts that it is judged on.

    Attributes:
        trained: The mask.
        goal: What was aimed at, on these prompts.
        loss: By what is left of the blocks: `mask`, `model` (all), `none`, `removed` (all but the
            mask); and over draws of random masks with as many weights of each matrix, `random` and
            `random_removed`.
        r: Correlation of surprisals with the bigrams, of the same; empty without bigrams.
        held_out: Whether the prompts took no part in training.
    """

    trained: Trained
    goal: Goal
    loss: dict[str, list[float]]
    r: dict[str, list[float]]
    held_out: bool

    @property
    def share(self) -> float:
        """Share of the weights that is kept."""
        return float(self.trained.kept.float().mean())


def judged(
    trained: Trained, goal: Goal, *, draws: int, seed: int, held_out: bool
) -> Judged:  # fmt: skip
    """Run the mask and its controls on the goal's prompts."""
    weights, kept = goal.weights, trained.kept
    others = [weights.random(kept, seed=seed + draw) for draw in range(draws)]
    masks: dict[str, list[Bool[Tensor, " weight"]]] = {
        "mask": [kept], "model": [torch.ones_like(kept)], "none": [torch.zeros_like(kept)],
        "removed": [~kept], "random": others, "random_removed": [~other for other in others],
    }  # fmt: skip
    loss = {name: [goal.value(mask) for mask in some] for name, some in masks.items()}
    r = {}
    if goal.bigrams is not None:
        r = {name: _correlations(weights, some, goal, goal.bigrams)
             for name, some in masks.items() if "removed" not in name}  # fmt: skip
    return Judged(trained, goal, loss, r, held_out)


def _correlations(
    weights: Weights, masks: list[Bool[Tensor, " weight"]], goal: Goal, bigrams: Bigrams
) -> list[float]:
    return [correlation(weights, mask, goal.pairs, bigrams) for mask in masks]


def weight_data(found: Judged) -> "xarray.Dataset":
    """The result's numbers."""
    import xarray

    matrices = found.goal.weights.matrices
    kept = found.trained.kept
    data: dict[str, Any] = {
        "kept": ("part", found.goal.weights.shares(kept)),
        "count": ("part", [int(kept[m.span].sum()) for m in matrices]),
        **training_data(found.trained),
        "kept_share": ((), found.share),
        "weights": ((), len(kept)),
    }
    # The curve of training is called `loss`; what is judged gets a name of its own.
    for start, values in (("loss", found.loss), ("r", found.r)):
        for name, numbers in values.items():
            axes = "random" if name.startswith("random") else ()
            data[f"{start}_{name}"] = (axes, numbers if axes else numbers[0])
    coords = {
        "matrix": ("part", [m.name for m in matrices]),
        "matrix_layer": ("part", [m.layer for m in matrices]),
    }
    return xarray.Dataset(data, coords=coords)


def weight_view(found: Judged) -> View:
    """The claim, its controls, and where the kept weights lie."""
    weights, kept = found.goal.weights, found.trained.kept
    rows = [
        [m.layer, m.name, int(kept[m.span].sum()), share]
        for m, share in zip(weights.matrices, weights.shares(kept), strict=True)
    ]
    columns = ["layer", "matrix", "kept", {"name": "share", "format": ".2%"}]
    unit = "nats" if found.goal.loss != "metric" else found.goal.metric.unit
    return group(
        [
            sentences(_statements(found), title="What few weights do"),
            table(columns, rows, title="Where they lie"),
            training_view(found.trained, unit),
        ],
        title="Weight masks",
    )


def _statements(found: Judged) -> list[str]:
    loss, r = found.loss, found.r
    n = int(found.trained.kept.sum())
    share, total = found.share, len(found.trained.kept)
    text = [
        f"{n:,} of the {total:,} block weights ({share:.2%}) reach a loss of"
        f" {loss['mask'][0]:.3f} ({_WHAT[found.goal.loss]}); random masks with as many weights of"
        f" each matrix reach {_mean(loss['random']):.3f}, all weights {loss['model'][0]:.3f}, none"
        f" {loss['none'][0]:.3f}.",
    ]
    if r and found.goal.bigrams is not None:
        text.append(
            f"Their surprisals correlate {r['mask'][0]:.2f} with bigrams"
            f" ({found.goal.bigrams.about}); random masks {_mean(r['random']):.2f}, the whole model"
            f" {r['model'][0]:.2f}, no block weights {r['none'][0]:.2f}."
        )
    text.append(
        f"Without them the loss is {loss['removed'][0]:.3f}; without as many random ones"
        f" {_mean(loss['random_removed']):.3f}."
    )
    prompts = f"{len(found.goal.pairs)} pairs of prompts"
    text.append(
        f"Judged on {prompts} that took no part in training."
        if found.held_out
        else f"Trained and judged on the same {prompts}: on others it may do worse."
    )
    return text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
