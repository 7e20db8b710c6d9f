"""Items with a prior: what a model says before it knows the question, and how layers follow it.

The prior of a token is the logarithm of how likely it is without the task: the model's probability
after task-free stems, its frequency in texts, or, failing both, the model's mean probability after
the other items' prompts. Everything is read at the last token, by the lens, after every block:

    margin(l)    lens logit of the right answer - that of the prior's favourite among other answers
    slope(l)     over the other candidate answers, lens logit by log prior (logits per nat)
    carried(l)   slope(l) - slope(l - 1): what block l adds to it
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.core.errors import UsageError
from underhood.core.head import Head
from underhood.core.model import Model
from underhood.core.site import Site
from underhood.core.tokens import Tokens
from underhood.methods.locate._trace import last_states, streams

__all__ = ["Items", "Readings", "items_of", "permuted", "readings_of", "spearman"]

_PERMUTATIONS = 200
_LEAST = 4  # items for a rank correlation


@dataclass(frozen=True, slots=True)
class Items:
    """Prompts with a right answer and a prior.

    Attributes:
        tokens: The prompts.
        answers: Right answer of each.
        candidates: All different answers.
        right: Number of each item's answer among the candidates.
        prior: Log prior over the vocabulary, per item (one row if it is the same for all).
        train: Items whose answers are chosen by; the others are tested on. No answer is in both.
    """

    tokens: Tokens
    answers: Int[Tensor, " batch"]
    candidates: Int[Tensor, " candidate"]
    right: Int[Tensor, " batch"]
    prior: Float[Tensor, "row vocab"]
    train: Bool[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def priors(self) -> Float[Tensor, "batch candidate"]:
        """Log prior of each candidate."""
        return self.prior[:, self.candidates].expand(len(self), -1)

    @property
    def own(self) -> Float[Tensor, " batch"]:
        """Log prior of the right answer."""
        return self.priors.gather(1, self.right[:, None])[:, 0]

    @property
    def others(self) -> Bool[Tensor, "batch candidate"]:
        """The candidates that are not the answer."""
        return torch.arange(len(self.candidates))[None] != self.right[:, None]

    @property
    def favoured(self) -> Int[Tensor, " batch"]:
        """The wrong candidate with the highest prior, by number."""
        return self.priors.masked_fill(~self.others, -torch.inf).argmax(1)

    def of(self, token: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Log prior of one token per item."""
        return self.prior.expand(len(self), -1).gather(1, token[:, None])[:, 0]

    @property
    def quartile(self) -> Int[Tensor, " batch"]:
        """Quarter of each item by the prior of its answer: 0 rare, 3 common."""
        order = self.own.argsort(stable=True).argsort()
        return order * 4 // len(self)


def items_of(
    model: Model,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    stems: Sequence[str] = (),
    corpus: Sequence[str] = (),
    seed: int = 0,
    batch_size: int | None = None,
) -> Items:
    """Items, checked.

    Raises:
        UsageError: Not one answer per prompt, stems and a corpus at once, or fewer than four
            different answers.
    """
    if len(answers) != len(prompts):
        raise UsageError(
            "each prompt needs its right answer",
            given=f"{len(prompts)} prompts, {len(answers)} answers",
            do="give answers=(...), one token each",
        )
    if stems and corpus:
        raise UsageError(
            "a prior comes from stems or from a corpus", given="both", do="leave one of them out"
        )
    ids = torch.tensor([model.token_id(text) for text in answers])
    candidates, right = ids.unique(return_inverse=True)
    if len(candidates) < 4:
        raise UsageError(
            "a prior is a matter of many answers",
            given=f"{len(candidates)} different answers",
            why="half of the answers are set aside for testing",
            do="give prompts with four different answers or more",
        )
    tokens = model.tokens(list(prompts))
    if corpus:
        prior = _frequencies(model, corpus, prompts[0])
    elif stems:
        said = last_states(model, model.tokens(list(stems)), [], batch_size=batch_size)[1]
        prior = _log_mean(said.log_softmax(-1))[None].cpu()
    else:
        prior = _without_own(last_states(model, tokens, [], batch_size=batch_size)[1]).cpu()
    kept = _half(prior[:, candidates].mean(0), seed)
    return Items(tokens, ids, candidates, right, prior, torch.isin(right, kept))


def _half(priors: Float[Tensor, " candidate"], seed: int) -> Int[Tensor, " half"]:
    """Half of the answers, as many rare as common ones: one of each two neighbours by prior."""
    rng, order = random.Random(seed), priors.argsort(stable=True).tolist()
    return torch.tensor([rng.choice(order[i : i + 2]) for i in range(0, len(order), 2)])


def _frequencies(model: Model, corpus: Sequence[str], prompt: str) -> Float[Tensor, "1 vocab"]:
    """Log frequency of every token, each counted once more than it occurs."""
    width = last_states(model, model.tokens([prompt]), [])[1].shape[1]
    counts = torch.ones(width, dtype=torch.float64)
    for text in corpus:  # by the tokenizer itself: a text may be longer than the context
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=width)[:width]
    return (counts / counts.sum()).log().float()[None]


def _log_mean(log: Float[Tensor, "row vocab"]) -> Float[Tensor, " vocab"]:
    return log.logsumexp(0) - math.log(len(log))


def _without_own(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    """Per item, the log of the mean probability after the other items' prompts."""
    sure = logits.double().softmax(-1)
    return ((sure.sum(0) - sure) / (len(sure) - 1)).clamp(min=1e-12).log().float()


@dataclass(frozen=True, slots=True)
class Readings:
    """What the lens reads at the last token; layer 0 is the stream before the first block.

    Attributes:
        candidates: Lens logits of the candidates.
        rival: Lens log-probability of each item's rival.
        rivals: The token said, where it is wrong; else the likeliest other one.
        correct: Whether the model says the answer.
        states: The sites' vectors.
    """

    candidates: Float[Tensor, "layer batch candidate"]
    rival: Float[Tensor, "layer batch"]
    rivals: Int[Tensor, " batch"]
    correct: Bool[Tensor, " batch"]
    states: dict[Site, Tensor]

    def margin(self, items: Items) -> Float[Tensor, "layer batch"]:
        """Right answer minus the prior's favourite, logits."""
        rows = torch.arange(len(items))
        return self.candidates[:, rows, items.right] - self.candidates[:, rows, items.favoured]

    def slope(
        self, items: Items, priors: Float[Tensor, "batch candidate"] | None = None
    ) -> Float[Tensor, "layer batch"]:
        """Lens logit by log prior over the other candidates, least squares, logits per nat."""
        x = items.priors if priors is None else priors
        x, here = x.double(), items.others
        x = (x - (x * here).sum(1, keepdim=True) / here.sum(1, keepdim=True)) * here
        return (self.candidates.double() * x).sum(-1) / x.pow(2).sum(-1).clamp(min=1e-12)


def readings_of(
    model: Model, head: Head, items: Items, sites: Sequence[Site], *, batch_size: int | None
) -> Readings:
    """Run the items once and read every layer."""
    each = streams(model)
    states, logits = last_states(model, items.tokens, [*each, *sites], batch_size=batch_size)
    answers, said = items.answers.to(logits.device), logits.argmax(-1)
    correct = said == answers
    beside = logits.scatter(1, answers[:, None], -torch.inf).argmax(-1)
    rivals = torch.where(correct, beside, said)
    wanted, follow = [], []
    for site in each:
        lens = head.logits(states[site]).float()
        wanted.append(lens[:, items.candidates.to(lens.device)])
        follow.append(lens.log_softmax(-1).gather(1, rivals[:, None])[:, 0])
    return Readings(
        torch.stack(wanted).cpu(), torch.stack(follow).cpu(), rivals.cpu(), correct.cpu(),
        states,
    )  # fmt: skip


def spearman(a: Float[Tensor, "*rest n"], b: Float[Tensor, " n"]) -> Float[Tensor, "*rest"]:
    """Rank correlation over the last axis; NaN for fewer than four items or no variation."""
    if len(b) < _LEAST:
        return torch.full(a.shape[:-1], torch.nan, dtype=torch.float64)
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean()
    size = x.norm(dim=-1) * y.norm()
    return torch.where(size > 1e-9, (x * y).sum(-1) / size, torch.nan)


def _ranks(values: Tensor) -> Float[Tensor, "*rest n"]:
    """Ranks over the last axis; equal values share their mean rank."""
    from scipy.stats import rankdata

    return torch.as_tensor(rankdata(values.double().numpy(), axis=-1)).double()


def permuted(size: int, seed: int) -> list[Tensor]:
    """Orders of `size` things."""
    make = torch.Generator().manual_seed(seed)
    return [torch.randperm(size, generator=make) for _ in range(_PERMUTATIONS)]
