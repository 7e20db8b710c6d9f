"""What a patch writes: the other run's activation, a mean, zeros, or a learned constant.

    resample        what the other prompt put there
    mean            the mean over both prompts of all rows and their tokens, first tokens left out
    mean-position   the mean over both prompts of all rows at the same position
    zero            zeros
    optimal         the constant vector with which the answer suffers least (`optimal_constants`)

Means of an expert are over the tokens that it was chosen for.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underhood.core.edit import Edit
from underhood.core.errors import NotFinite, PairError
from underhood.core.model import Model
from underhood.core.ops import set_to
from underhood.core.tokens import Tokens, Where
from underhood.data import EncodedPairs
from underhood.methods.locate._places import Cell, Place

__all__ = ["Job", "Learning", "check_structure", "means_of", "optimal_constants"]


def check_structure(pairs: EncodedPairs) -> None:
    """Refuse a mean per position over prompts that are not built alike.

    Raises:
        PairError: Prompts of different length.
    """
    lengths = pairs.clean.lengths
    if len(set(lengths)) > 1:
        raise PairError(
            "a mean per position needs prompts of equal structure",
            given=f"prompts of {min(lengths)} to {max(lengths)} tokens",
            why="position 5 of one prompt is not what position 5 of another is",
            do="use prompts of one template, or value='mean'",
        )


def means_of(
    model: Model,
    places: Sequence[Place],
    sides: Iterable[Tokens],
    *,
    per_position: bool,
) -> dict[Place, Float[Tensor, "#pos unit width"]]:
    """Mean activation of each place's units.

    The first token's activation is often hundreds of times longer than others and would be all of
    the mean over tokens; it is left out there, where prompts have others.

    Args:
        model: The model.
        places: The places.
        sides: Batches of prompts.
        per_position: A mean for each position, or one for all.
    """
    sums: dict[Place, Tensor] = {}
    counts: dict[Place, Tensor] = {}
    wanted = list(dict.fromkeys(site for place in places for site in place.recorded))
    for tokens in sides:
        run = model.run(tokens, record=wanted)
        keep = tokens.mask.to(model.device)
        later = keep & (tokens.position_ids > 0).to(model.device)
        keep = later if bool(later.any()) and not per_position else keep
        for place in places:
            form = place.read(run).double()
            use = keep[:, :, None] & _chosen(place, form)
            axes = (0,) if per_position else (0, 1)
            total = (form * use[..., None]).sum(axes)
            number = use.sum(axes)
            sums[place] = sums[place] + total if place in sums else total
            counts[place] = counts[place] + number if place in counts else number
    means = {place: sums[place] / counts[place].clamp(min=1)[..., None] for place in places}
    return means if per_position else {place: mean[None] for place, mean in means.items()}


def _chosen(place: Place, form: Tensor) -> Bool[Tensor, "rows pos unit"]:
    """Where a unit is there at all: experts only at the tokens that chose them."""
    if place.by_slot and place.units is not None:
        return form.abs().amax(-1) > 0
    return torch.ones(form.shape[:3], dtype=torch.bool, device=form.device)


# Optimal constants -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Learning:
    """How constants are learned: Adam, at most `steps` steps of `rate`."""

    steps: int = 1000
    rate: float = 1e-3


_STALE = 50  # steps without a better value after which learning ends
_BETTER = 1e-5  # what counts as better, of the metric's size


def optimal_constants(
    job: "Job", starts: Sequence[Float[Tensor, " width"]], how: Learning, *, rows: int
) -> list[Float[Tensor, " width"]]:
    """Per cell the constant that, written there in every prompt, keeps the metric highest.

    Cells are rows of one batch and learn side by side: their losses do not meet.

    Args:
        job: The cells and the prompts that are edited.
        starts: Where each constant begins (a mean).
        how: Steps and rate.
        rows: Rows of one pass.
    """
    each = max(1, rows // len(job.tokens))
    found: list[Tensor] = []
    for first in range(0, len(job.cells), each):
        numbers = range(first, min(first + each, len(job.cells)))
        found += _learn(job, numbers, [starts[n] for n in numbers], how, rows)
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """What constants are learned for.

    Attributes:
        model: The model.
        tokens: The prompts that are edited.
        cells: The cells.
        shaped: A cell's vector (by number), in the axes that its edit sees.
        metric: From logits and the numbers of their prompts to one number per row.
    """

    model: Model
    tokens: Tokens
    cells: Sequence[Cell]
    shaped: Callable[[int, Tensor], Tensor]
    metric: Callable[[Tensor, Sequence[int]], Tensor]

    def means(self, numbers: Sequence[int], values: Sequence[Tensor], rows: range) -> Tensor:
        """Per cell the metric's sum over some prompts, with the constants in place."""
        cut = slice(rows.start, rows.stop)
        block = Tokens(self.tokens.ids[cut], self.tokens.mask[cut])
        edits = []
        for index, (number, value) in enumerate(zip(numbers, values, strict=True)):
            cell = self.cells[number]
            here = [
                index * len(rows) + row for row, length in enumerate(block.lengths)
                if cell.pos is None or cell.pos < length
            ]  # fmt: skip
            if here:
                op = set_to(self.shaped(number, value))
                edits.append(Edit(cell.site, op, Where(cell.pos, rows=here)))
        run = self.model.run(block.repeat(len(numbers)), edits=edits, grad=True)
        found = self.metric(run.last_logits, list(rows) * len(numbers))
        return found.view(len(numbers), len(rows)).sum(1)


def _learn(
    job: Job, numbers: Sequence[int], starts: Sequence[Tensor], how: Learning, rows: int
) -> list[Tensor]:
    batch = len(job.tokens)
    values = [s.detach().float().clone().requires_grad_() for s in starts]
    best = [v.detach().clone() for v in values]
    score = torch.full((len(numbers),), -torch.inf, dtype=torch.float64)
    optimiser, stale = torch.optim.Adam(values, lr=how.rate), 0
    for step in range(how.steps + 1):
        optimiser.zero_grad()
        now = torch.zeros(len(numbers), dtype=torch.float64)
        for block in job.tokens.blocks(rows):
            sums = job.means(numbers, values, block)
            _check(sums, numbers, job)
            now += sums.detach().double().cpu() / batch
            grads = torch.autograd.grad(-sums.sum() / batch, values, allow_unused=True)
            for value, grad in zip(values, grads, strict=True):
                if grad is not None:
                    value.grad = grad if value.grad is None else value.grad + grad
        better = now > score + _BETTER * score.abs().clamp(max=1e30)
        for index in better.nonzero()[:, 0].tolist():
            best[index] = values[index].detach().clone()
        score = torch.where(better, now, score)
        stale = 0 if bool(better.any()) else stale + 1
        if step == how.steps or stale > _STALE:
            break
        optimiser.step()
    return best


def _check(sums: Tensor, numbers: Sequence[int], job: Job) -> None:
    bad = ~torch.isfinite(sums)
    if bool(bad.any()):
        cell = job.cells[numbers[int(bad.nonzero()[0])]]
        raise NotFinite(
            "the metric stopped being a number while a constant was learned",
            given=f"{cell.site} at position {cell.pos}",
            do="a smaller rate, or another metric",
        )
