"""Masks over weights: a model in which some weights of attention and MLPs are zero.

The masked weights are handed to the forward pass (`torch.func.functional_call`); the model's own
stay what they are. Embeddings, norms and biases are never masked, so that with every block weight
zero the model still says what its embedding and unembedding make of one token.

A bigram subnetwork is what keeps a model close to bigram probabilities with few weights.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from underhood.circuits.gradients import frozen
from underhood.core.errors import NotOffered, UsageError
from underhood.core.model import Model
from underhood.core.taps.patches import evaluating
from underhood.core.tokens import Tokens
from underhood.data import EncodedPairs, Metric

__all__ = ["Bigrams", "Goal", "Matrix", "Weights", "bigrams_counted", "bigrams_of", "correlation"]

_ROWS = 64  # rows of a pass that keeps nothing


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix of a block.

    Attributes:
        name: Its path from the block on.
        path: Its path in the model.
        layer: The block.
        span: Which of the flat mask's values are its own.
    """

    name: str
    path: str
    layer: int
    span: slice


class Weights:
    """The masked weights of a model: all matrices of its blocks, as one flat mask.

    Args:
        model: The model; it is not changed.

    Raises:
        NotOffered: No blocks, or blocks without floating-point matrices (quantised ones).
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        stack = model.anatomy.stacks.get(model.main)
        found: list[Matrix] = []
        start = 0
        parameters = dict(model.module.named_parameters())
        for layer, block in enumerate(stack.blocks if stack else ()):
            for path, weight in parameters.items():
                if not path.startswith(block.path + ".") or weight.ndim < 2:
                    continue
                if not weight.is_floating_point():
                    continue
                stop = start + weight.numel()
                name = path.removeprefix(block.path + ".").removesuffix(".weight")
                found.append(Matrix(name, path, layer, slice(start, stop)))
                start = stop
        if not found:
            raise NotOffered(
                "this model has no weights that could be masked",
                given=repr(model),
                why="no blocks were recognised, or their matrices are quantised",
                do="use level='edge' or level='node', or load it in float32",
            )
        self.matrices, self.total = found, start

    def logits(
        self, values: Float[Tensor, " weight"], tokens: Tokens, *, grad: bool = False
    ) -> Float[Tensor, "rows pos vocab"]:
        """What the model says when each weight is multiplied by its mask value."""
        given = self.model.batch(tokens)[1]
        if "use_cache" in self.model.forward_names:
            given = given | {"use_cache": False}
        module = self.model.module
        parameters = dict(module.named_parameters())
        with frozen(module), evaluating(module), torch.set_grad_enabled(grad):
            masked = {}
            for matrix in self.matrices:
                own = parameters[matrix.path].detach()
                share = values[matrix.span].view(own.shape).to(own.device, own.dtype)
                masked[matrix.path] = own * share
            return torch.func.functional_call(module, masked, args=(), kwargs=given).logits

    def shares(self, kept: Bool[Tensor, " weight"]) -> list[float]:
        """Share of each matrix that is kept."""
        return [float(kept[matrix.span].float().mean()) for matrix in self.matrices]

    def random(self, kept: Bool[Tensor, " weight"], *, seed: int) -> Bool[Tensor, " weight"]:
        """Another mask with as many weights of each matrix: the control."""
        make = torch.Generator().manual_seed(seed)
        other = kept.clone()
        for matrix in self.matrices:
            part = kept[matrix.span]
            other[matrix.span] = part[torch.randperm(len(part), generator=make)]
        return other


# Bigrams -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bigrams:
    """What comes after single tokens.

    Attributes:
        rows: Row of `probs` for each id of the vocabulary (-1: not known).
        probs: Distributions of the next token.
        about: Where they come from.
    """

    rows: Int[Tensor, " vocab"]
    probs: Float[Tensor, "known vocab"]
    about: str

    def after(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape vocab"]:
        """Distributions after some tokens."""
        return self.probs[self.rows[ids.cpu()]]


def bigrams_of(model: Model, both: Sequence[Tokens]) -> Bigrams:
    """The model's own: what it says after each token of some prompts when it sees only that one.

    Where all prompts begin with one token (`<bos>`), it comes first here too.
    """
    wanted, vocab = _ids(both), _vocabulary(model, both)
    first = {
        int(row[start])
        for tokens in both
        for row, start in zip(tokens.ids, tokens.starts, strict=True)
    }
    before = first.pop() if len(first) == 1 else None
    found = []
    for some in wanted.split(_ROWS):
        ids = some[:, None]
        if before is not None:
            ids = torch.cat([torch.full_like(ids, before), ids], 1)
        logits = model.run(model.text.of_ids(ids, None)).logits.float().cpu()
        # The first token itself has nothing before it.
        found.append(
            torch.where(
                some[:, None] == (-1 if before is None else before), logits[:, 0], logits[:, -1]
            ).softmax(-1)
        )
    return Bigrams(_numbered(wanted, vocab), torch.cat(found), "the model's own")


def bigrams_counted(model: Model, texts: Sequence[str], both: Sequence[Tokens]) -> Bigrams:
    """Counted in texts: `(n(a, b) + p(b)) / (n(a) + 1)`, p(b) the smoothed share of b by itself.

    So a token that never came up is followed by what is common.
    """
    wanted, vocab = _ids(both), _vocabulary(model, both)
    pairs: Counter[tuple[int, int]] = Counter()
    single = torch.ones(vocab)
    for text in texts:
        ids = model.tokens(text).ids[0].tolist()
        pairs.update(zip(ids, ids[1:], strict=False))
        single += torch.bincount(torch.tensor(ids[1:], dtype=torch.long), minlength=vocab)
    rows = _numbered(wanted, vocab)
    counts = torch.zeros(len(wanted), vocab)
    for (one, other), count in pairs.items():
        if rows[one] >= 0:
            counts[rows[one], other] = count
    probs = (counts + single / single.sum()) / (counts.sum(1, keepdim=True) + 1)
    return Bigrams(rows, probs, f"counted in {len(texts)} texts")


def _ids(both: Sequence[Tokens]) -> Int[Tensor, " known"]:
    return torch.cat([tokens.ids[tokens.mask].flatten().cpu() for tokens in both]).unique()


def _numbered(ids: Tensor, vocab: int) -> Int[Tensor, " vocab"]:
    rows = torch.full((vocab,), -1)
    rows[ids] = torch.arange(len(ids))
    return rows


def _vocabulary(model: Model, both: Sequence[Tokens]) -> int:
    return model.run(both[0].row(0)).logits.shape[-1]


# What is aimed at --------------------------------------------------------------------------------


class Goal:
    """The loss of masked weights on pairs of prompts; both prompts of a pair count.

    Args:
        weights: The masked weights.
        pairs: The prompts.
        loss: "bigram": cross-entropy with bigram probabilities, at every token; "kl": KL from the
            whole model, at every token; "metric": minus the metric, "answer": cross-entropy of the
            answers, both at the clean prompts' last token.
        metric: For "metric".
        bigrams: For "bigram".
    """

    def __init__(
        self,
        weights: Weights,
        pairs: EncodedPairs,
        loss: str,
        metric: Metric,
        bigrams: Bigrams | None = None,
    ) -> None:
        if loss == "bigram" and bigrams is None:
            raise UsageError(
                "bigram probabilities are needed",
                given="bigrams=None",
                do="make them with bigrams_of or bigrams_counted",
            )
        self.weights, self.pairs, self.loss, self.metric = weights, pairs, loss, metric
        self.bigrams = bigrams
        self.ones = torch.ones(weights.total, device=weights.model.device)

    def __call__(self, values: Tensor, index: Sequence[int]) -> Tensor:
        rows, grad = self.pairs.rows(list(index)), torch.is_grad_enabled()
        if self.loss in ("metric", "answer"):
            return self._last(values, rows, grad)
        return (self._all(values, rows.clean, grad) + self._all(values, rows.contrast, grad)) / 2

    def _last(self, values: Tensor, rows: EncodedPairs, grad: bool) -> Tensor:
        reference = None
        if self.metric.uses_reference:
            reference = _at_last(self.weights.logits(self.ones, rows.clean), rows.clean)
        logits = _at_last(self.weights.logits(values, rows.clean, grad=grad), rows.clean)
        answers, wrong = rows.answers.to(logits.device), rows.wrong.to(logits.device)
        return -self.metric(logits, answers, wrong, reference=reference).mean()

    def _all(self, values: Tensor, tokens: Tokens, grad: bool) -> Tensor:
        real = tokens.mask.to(self.weights.model.device)
        now = self.weights.logits(values, tokens, grad=grad)[real].float().log_softmax(-1)
        if self.loss == "kl":
            before = self.weights.logits(self.ones, tokens)[real].float().log_softmax(-1)
            return (before.exp() * (before - now)).sum(-1).mean()
        assert self.bigrams is not None
        wanted = self.bigrams.after(tokens.ids[tokens.mask]).to(now.device)
        return -(wanted * now).sum(-1).mean()

    def value(self, kept: Tensor) -> float:
        """The loss of a mask on all prompts."""
        total = 0.0
        with torch.no_grad():
            for index in self.pairs.blocks(_ROWS):
                total += float(self(kept.to(self.ones), index)) * len(index) / len(self.pairs)
        return total


def _at_last(logits: Tensor, tokens: Tokens) -> Tensor:
    ends = [a + b - 1 for a, b in zip(tokens.starts, tokens.lengths, strict=True)]
    return logits[torch.arange(len(ends)), ends]


def correlation(weights: Weights, kept: Tensor, pairs: EncodedPairs, bigrams: Bigrams) -> float:
    """Pearson correlation of surprisals: of each prompt's tokens, masked model against bigrams."""
    mine, theirs = [], []
    for tokens in (pairs.clean, pairs.contrast):
        logits = weights.logits(kept.to(weights.model.device).float(), tokens)
        now = logits.float().cpu().log_softmax(-1)
        ids, real = tokens.ids.cpu(), tokens.mask.cpu()
        real = real[:, 1:] & real[:, :-1]
        following, table = (
            ids[:, 1:, None],
            bigrams.after(ids),
        )  # whatever follows padding is left out
        mine.append(now[:, :-1].gather(2, following)[..., 0][real])
        theirs.append(table[:, :-1].log().gather(2, following)[..., 0][real])
    return float(torch.corrcoef(torch.stack([torch.cat(mine), torch.cat(theirs)]).double())[0, 1])
