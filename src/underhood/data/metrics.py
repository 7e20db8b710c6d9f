"""Metrics: one number per row from the logits at the answer position. Higher supports the answer.

    logit_diff     mean logit of the answers - mean logit of the wrong answers        logits
    logit          mean logit of the answers                                          logits
    prob           probability that one of the answers comes next                     probability
    log_prob       its logarithm                                                      nats
    prob_diff      probability of the answers - probability of the wrong answers      probability
    cross_entropy  mean log-probability of the answers (minus the cross-entropy)      nats
    kl             minus KL(reference || now)                                         nats
    rank           minus the number of other tokens above the best answer             rank

Distances are negated, so that all metrics have one sign. Sums run in float32 (float64 logits stay
float64), whatever the model computes in. All but `rank` are differentiable.

    >>> logits = torch.tensor([[2.0, 0.5, 0.0]])
    >>> logit_diff(logits, torch.tensor([[0]]), torch.tensor([[1]]))
    tensor([1.5000])
"""

from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.errors import PairError, UsageError, nearest
from underhood.data.metric import Asked, Metric

__all__ = [
    "METRICS",
    "cross_entropy",
    "kl",
    "log_prob",
    "logit",
    "logit_diff",
    "metric_named",
    "normalised",
    "prob",
    "prob_diff",
    "rank",
]


def _picked(
    logits: Float[Tensor, "batch vocab"], ids: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch n"]:
    """Logits of the ids; 0 where the ids are padding."""
    return logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)


def _mean(logits: Float[Tensor, "batch vocab"], ids: Int[Tensor, "batch n"]) -> Tensor:
    return _picked(logits, ids).sum(1) / (ids >= 0).sum(1)


def _log_sum(logits: Float[Tensor, "batch vocab"], ids: Int[Tensor, "batch n"]) -> Tensor:
    """Log-probability that the next token is any of the ids, in nats."""
    mine = _picked(logits, ids).masked_fill(ids < 0, -torch.inf)
    return mine.logsumexp(1) - logits.logsumexp(1)


def _logit_diff(asked: Asked) -> Tensor:
    return _mean(asked.logits, asked.answers) - _mean(asked.logits, asked.wrong)


def _logit(asked: Asked) -> Tensor:
    return _mean(asked.logits, asked.answers)


def _prob(asked: Asked) -> Tensor:
    return _log_sum(asked.logits, asked.answers).exp()


def _log_prob(asked: Asked) -> Tensor:
    return _log_sum(asked.logits, asked.answers)


def _prob_diff(asked: Asked) -> Tensor:
    return _prob(asked) - _log_sum(asked.logits, asked.wrong).exp()


def _cross_entropy(asked: Asked) -> Tensor:
    return _mean(asked.logits, asked.answers) - asked.logits.logsumexp(1)


def _kl(asked: Asked) -> Tensor:
    now, before = asked.logits.log_softmax(1), asked.reference.log_softmax(1)
    return -(before.exp() * (before - now)).sum(1)


def _rank(asked: Asked) -> Tensor:
    logits, ids = asked.logits, asked.answers
    best = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf).amax(1)
    # One more column takes the padding; the answers do not compete with each other.
    mine = torch.zeros(len(ids), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    mine = mine.scatter(1, ids.masked_fill(ids < 0, logits.shape[1]), True)[:, :-1]
    # >=: ties count against the answer, so a constant readout gets the worst rank.
    return -((logits >= best[:, None]) & ~mine).sum(1).to(logits.dtype)


logit_diff = Metric(
    "logit_diff",
    _logit_diff,
    "logits",
    "mean logit of the answers minus mean logit of the wrong answers",
    uses_wrong=True,
    uses_all=False,
)
logit = Metric("logit", _logit, "logits", "mean logit of the answers", uses_all=False)
prob = Metric("prob", _prob, "probability", "probability that one of the answers comes next")
log_prob = Metric(
    "log_prob", _log_prob, "nats", "log-probability that one of the answers comes next"
)
prob_diff = Metric(
    "prob_diff",
    _prob_diff,
    "probability",
    "probability of the answers minus probability of the wrong answers",
    uses_wrong=True,
)
kl = Metric(
    "kl",
    _kl,
    "nats",
    "minus the KL divergence of the next-token distribution from the reference pass's",
    uses_answers=False,
    uses_reference=True,
)
rank = Metric(
    "rank",
    _rank,
    "rank",
    "minus the number of other tokens at or above the best answer",
    differentiable=False,
)
cross_entropy = Metric(
    "cross_entropy", _cross_entropy, "nats", "mean log-probability of the answers"
)

METRICS: dict[str, Metric] = {
    m.name: m for m in (logit_diff, logit, prob, log_prob, prob_diff, cross_entropy, kl, rank)
}


def metric_named(name: str | Metric) -> Metric:
    """The metric of this name; a `Metric` comes back as it is.

    Raises:
        UsageError: No such metric; the message carries the nearest names.

    Example:
        >>> metric_named("kl").unit
        'nats'
    """
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise UsageError(
            f"there is no metric named {name!r}",
            given=name,
            do=f"use one of the nearest names: {nearest(name, METRICS)}",
        )
    return METRICS[name]


@overload
def normalised(value: float, clean: float, contrast: float, *, tolerance: float = ...) -> float: ...
@overload
def normalised(
    value: Tensor, clean: Tensor | float, contrast: Tensor | float, *, tolerance: float = ...
) -> Tensor: ...
def normalised(
    value: Float[Tensor, "..."] | float,
    clean: Float[Tensor, "..."] | float,
    contrast: Float[Tensor, "..."] | float,
    *,
    tolerance: float = 1e-6,
) -> Float[Tensor, "..."] | float:
    """The metric on the scale where the contrast is 0 and the clean run is 1 (no unit).

    Args:
        value: The metric after a change; tensors broadcast against `clean` and `contrast`.
        clean: The metric of the clean run.
        contrast: The metric of the contrast run.
        tolerance: The least difference that can be divided by, in units of the metric and
            relative to its size; below it lies float32 noise.

    Raises:
        PairError: Clean and contrast have the same metric, so that there is no scale.

    Example:
        >>> normalised(2.0, 3.0, -1.0)
        0.75
    """
    top, bottom = torch.as_tensor(clean), torch.as_tensor(contrast)
    size = torch.maximum(top.abs(), bottom.abs()).clamp(min=1.0)
    # Written as "not larger", so that NaN is refused too.
    flat = ~((top - bottom).abs() > tolerance * size)
    if bool(flat.any()):
        row = int(flat.flatten().nonzero()[0])
        both = [float(x.expand(flat.shape).flatten()[row]) for x in (top, bottom)]
        raise PairError(
            "the metric does not tell the clean run from the contrast",
            given=f"clean {both[0]:.6g}, contrast {both[1]:.6g}"
            + (f" ({int(flat.sum())} of {flat.numel()} entries, first {row})" * (flat.ndim > 0)),
            why="the effect would be divided by zero",
            do="drop such pairs, use another metric, or report the difference in its own unit",
        )
    return (value - contrast) / (clean - contrast)
