"""How a subspace is learned from interchanges.

With `b` the base run (the clean prompt), `s` the source run (its contrast) and R orthonormal rows:

    h = h_b + R'R (h_s - h_b)              DAS: R is learned
    h = h_b + R' diag(m) R (h_s - h_b)     boundless: R is a full rotation, m a learned boundary;
                                           masks: R is fixed (the axes, or principal components)

Training goes by gradients through the edit that writes `h`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from underhood.core.errors import NotFinite, OutOfRange, PairError
from underhood.core.site import Site
from underhood.data import log_prob, logit_diff
from underhood.methods.locate._interchange import SAME, Interchange

__all__ = ["TRAINED", "Learned", "Training", "learn"]

TRAINED = ("das", "boundless", "mask", "mask-pca")
"""Kinds that are trained; the others are computed from the activations alone."""

_COLD = 0.01  # temperature of masks at the end of training, in units of their scores
_WIDEST, _SHARPEST = 50.0, 0.1  # temperature of the boundary, in dimensions (Wu et al. 2023)


@dataclass(frozen=True, slots=True)
class Training:
    """How a subspace is sought.

    Attributes:
        kind: One of `TRAINED`, "mean-difference" or "pca".
        size: Dimensions, for kinds that do not find it themselves.
        steps: Optimizer steps (Adam).
        lr: Learning rate.
        loss: "label" (cross-entropy on the contrast's answer) or "logit_diff".
        sparsity: Price of the share of dimensions that a boundary or mask leaves open.
        rows: Pairs of one step.
        seed: Of the start and of the order of pairs.
    """

    kind: str
    size: int
    steps: int
    lr: float
    loss: str
    sparsity: float
    rows: int
    seed: int


@dataclass(frozen=True, slots=True)
class Learned:
    """A subspace and how it was found.

    Attributes:
        basis: Orthonormal rows.
        losses: Loss of each step; none for kinds that are not trained.
    """

    basis: Float[Tensor, "k d"]
    losses: list[float]


class _Rotation(nn.Module):
    """DAS: k orthonormal rows."""

    def __init__(self, d: int, k: int, seed: int) -> None:
        super().__init__()
        self.turn = nn.Linear(d, k, bias=False)
        with torch.random.fork_rng(devices=[]):  # torch completes the rotation at random
            torch.manual_seed(seed)
            nn.init.orthogonal_(self.turn.weight)
            orthogonal(self.turn)

    def mix(self, delta: Tensor, progress: float) -> Tensor:
        """What is swapped in of the difference; `progress` runs from 0 to 1."""
        return (delta @ self.turn.weight.T) @ self.turn.weight

    def price(self) -> Tensor | float:
        """Share of dimensions in use, where that is learned."""
        return 0.0

    def settle(self) -> None:
        """Put parameters back into their range after a step."""

    def basis(self) -> Tensor:
        """The subspace that was found."""
        return self.turn.weight


class _Boundless(_Rotation):
    """Boundless DAS: a full rotation, of which the first dimensions are swapped."""

    def __init__(self, d: int, seed: int) -> None:
        super().__init__(d, d, seed)
        self.d, self.share = d, nn.Parameter(torch.tensor(0.5))

    def mix(self, delta: Tensor, progress: float) -> Tensor:
        # The paper's 50 dimensions are for widths of thousands; a narrow model starts narrower.
        widest = min(_WIDEST, self.d / 4)
        heat = widest + (_SHARPEST - widest) * progress
        place = torch.arange(self.d, device=delta.device) + 0.5
        open_ = torch.sigmoid((self.price() * self.d - place) / heat)
        return ((delta @ self.turn.weight.T) * open_) @ self.turn.weight

    def price(self) -> Tensor:
        return self.share

    def settle(self) -> None:
        # Clamping in the forward, as the paper's code does, has no gradient back from outside.
        self.share.clamp_(1e-3, 1.0)

    def basis(self) -> Tensor:
        return self.turn.weight[: max(1, round(float(self.price()) * self.d))]


class _Mask(nn.Module):
    """A mask over fixed directions: the site's own axes, or principal components (rows)."""

    def __init__(self, d: int, rows: Tensor | None) -> None:
        super().__init__()
        self.d, self.rows = d, rows
        self.scores = nn.Parameter(torch.zeros(d if rows is None else len(rows)))

    def mix(self, delta: Tensor, progress: float) -> Tensor:
        open_ = torch.sigmoid(self.scores / _COLD**progress)
        if self.rows is None:
            return delta * open_
        return ((delta @ self.rows.T) * open_) @ self.rows

    def price(self) -> Tensor:
        return torch.sigmoid(self.scores).mean()

    def settle(self) -> None:
        return None

    def basis(self) -> Tensor:
        chosen = self.scores > 0
        chosen[self.scores.argmax()] = True  # a subspace of no dimensions is none
        if self.rows is not None:
            return self.rows[chosen]
        return torch.eye(self.d, device=self.scores.device)[chosen]


def _module(asked: Training, work: Interchange, site: Site) -> _Rotation | _Mask:
    d = work.base[site].shape[-1]
    if asked.kind == "das":
        return _Rotation(d, asked.size, asked.seed)
    if asked.kind == "boundless":
        return _Boundless(d, asked.seed)
    rows = None
    if asked.kind == "mask-pca":
        both = torch.cat([x[site].flatten(0, -2) for x in (work.base, work.source)]).double()
        _, sizes, rows = torch.linalg.svd(both - both.mean(0), full_matrices=False)
        rows = rows[sizes > SAME * sizes[0]].float().to(work.model.device)
    return _Mask(d, rows)


def learn(
    work: Interchange, site: Site, asked: Training, *, labels: Tensor | None = None
) -> Learned:
    """A subspace of a site, from the pairs of `work`.

    Args:
        work: The pairs to learn from.
        site: Where.
        asked: How.
        labels: What each row's swapped run should say; default the contrast's answer.

    Raises:
        PairError: Too few pairs, or pairs whose mean difference is no direction.
        NotFinite: The loss is not a number.
    """
    if asked.kind not in TRAINED:
        return Learned(_computed(work, site, asked), [])
    module = _module(asked, work, site).to(work.model.device)
    parameters = list(module.parameters())
    # A shorter memory than usual: the first steps have gradients a hundred times larger.
    optimizer = torch.optim.Adam(parameters, lr=asked.lr, betas=(0.9, 0.95))
    targets = (work.pairs.wrong if labels is None else labels).to(work.model.device)
    order = torch.Generator().manual_seed(asked.seed)
    losses: list[float] = []
    queue: list[int] = []
    for step in range(asked.steps):
        if len(queue) < asked.rows:
            queue += torch.randperm(len(work), generator=order).tolist()
        rows, queue = queue[: asked.rows], queue[asked.rows :]
        base, source = (x[site][rows].float() for x in (work.base, work.source))
        values = base + module.mix(source - base, step / max(asked.steps - 1, 1))
        run = work.model.run(work.tokens(rows), edits=work.write(site, values, rows), grad=True)
        loss = _loss(work, run.last_logits, rows, targets, asked) + asked.sparsity * module.price()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NotFinite(
                "the loss of the subspace is not a number",
                given=f"{site}, step {step}",
                do="use a smaller learning rate, or float32",
            )
        # Gradients of our own parameters only; the model's weights never get any.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        with torch.no_grad():
            module.settle()
    with torch.no_grad():
        return Learned(module.basis().detach().float().cpu().clone(), losses)


def _loss(
    work: Interchange, logits: Tensor, rows: list[int], targets: Tensor, asked: Training
) -> Tensor:
    if asked.loss == "label":
        return -log_prob(logits, targets[rows]).mean()
    return logit_diff(logits, work.pairs.answers[rows].to(logits.device), targets[rows]).mean()


def _computed(work: Interchange, site: Site, asked: Training) -> Float[Tensor, "k d"]:
    """Directions that need no training: the differences' mean, or their main directions."""
    delta = work.differences(site)
    if asked.kind == "mean-difference":
        mean = delta.mean(0)
        if float(mean.norm()) <= SAME * max(float(delta.norm(dim=-1).mean()), 1e-30):
            raise PairError(
                "the two runs do not differ on average, so there is no mean direction",
                given=f"{site}: {len(delta)} differences",
                do="swap another position or layer, or learn the direction: kind='das'",
            )
        return (mean / mean.norm()).float()[None]
    if len(delta) < asked.size:
        raise OutOfRange(
            f"{asked.size} directions need as many differences to be taken from",
            given=f"{len(delta)} differences",
            do="give more pairs, or a smaller k",
        )
    return torch.linalg.svd(delta, full_matrices=False)[2][: asked.size].float()
