"""Data: pairs of prompts, metrics on logits, and prompts with the positions of their words.

    pairs = Pairs("The uncles", "The uncle", " are", " is")
    encoded = pairs.encode(model)                       # every refusal happens here
    logit_diff(logits, encoded.answers, encoded.wrong)  # one number per row

This floor knows models only through `Reads` (three questions to a tokenizer), so it can be used and
tested without one.
"""

from underhood.data.encoding import EncodedPairs
from underhood.data.metric import Metric, reindex
from underhood.data.metrics import (
    METRICS,
    cross_entropy,
    kl,
    log_prob,
    logit,
    logit_diff,
    metric_named,
    normalised,
    prob,
    prob_diff,
    rank,
)
from underhood.data.pairs import Pairs
from underhood.data.prompts import (
    FewShot,
    few_shot,
    last,
    load_prompts,
    span,
    token_positions,
)
from underhood.data.protocols import Answer, Reads

__all__ = [
    "METRICS",
    "Answer",
    "EncodedPairs",
    "FewShot",
    "Metric",
    "Pairs",
    "Reads",
    "cross_entropy",
    "few_shot",
    "kl",
    "last",
    "load_prompts",
    "log_prob",
    "logit",
    "logit_diff",
    "metric_named",
    "normalised",
    "prob",
    "prob_diff",
    "rank",
    "reindex",
    "span",
    "token_positions",
]
