"""Interchange at one place: both runs at the swapped positions, and the edits that exchange them.

The base run is the clean prompt, the source run its contrast. `Interchange` holds what both hold at
each row's own position, makes the edits that write into the base run, and measures what comes out.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.edit import Edit, Plan
from underhood.core.errors import PairError, UsageError, nearest
from underhood.core.model import Model
from underhood.core.ops import patch, swap_subspace
from underhood.core.site import Site
from underhood.core.sweep import rows_per_pass, sweep
from underhood.core.tokens import Tokens, Where
from underhood.data import EncodedPairs, Pairs, logit_diff, reindex

__all__ = ["SAME", "Interchange", "answered", "spots"]

_WORTH = 900  # cells x tokens from which sharing a prompt's prefix pays for its three passes

SAME = 1e-6
"""A difference between the two runs that is float noise, relative to their size."""


def spots(encoded: EncodedPairs, pairs: Pairs, positions: str | int) -> list[int] | None:
    """The swapped position of each row (-1: its last); None for all positions.

    Raises:
        UsageError: Not a position, nor the name of one.
        OutOfRange: A prompt is shorter than that.
    """
    rows, words = len(encoded), pairs.word_positions or {}
    if positions == "all":
        return None
    if positions == "last":
        return [-1] * rows
    if positions == "changed":
        return list(encoded.first_difference)
    if isinstance(positions, str) and positions in words:
        positions = words[positions]
    try:
        spot = int(positions)
    except ValueError:
        known = ["last", "changed", "all", *words]
        raise UsageError(
            f"there is no position called {positions!r}",
            given=positions,
            do=f"give a number, or one of {nearest(str(positions), known, 5)}",
        ) from None
    Where(spot).validate(lengths=encoded.clean.lengths, generating=False)
    return [spot] * rows


def answered(model: Model, encoded: EncodedPairs) -> tuple[EncodedPairs, str]:
    """Missing answers filled in with the model's top tokens; and where they come from.

    Raises:
        PairError: The model says the same after both prompts of a row.
    """
    answers, wrong = encoded.answers, encoded.wrong
    if answers.shape[1] and wrong.shape[1]:
        return encoded, "as given"
    answers = answers if answers.shape[1] else _top(model, encoded.clean)
    wrong = wrong if wrong.shape[1] else _top(model, encoded.contrast)
    same = ((answers[:, :, None] == wrong[:, None]) & (answers >= 0)[:, :, None]).flatten(1).any(1)
    if bool(same.any()):
        row = int(same.nonzero()[0])
        raise PairError(
            "the model says the same after the clean prompt and after the contrast",
            given=f"row {row}: {model.token_text(int(wrong[row, 0]))!r}",
            why="the pairs came without answers, so the model's own were to be exchanged",
            do="give answers and wrong answers, or a contrast that changes what the model says",
        )
    return replace(encoded, answers=answers, wrong=wrong), "the model's own top tokens"


def _top(model: Model, tokens: Tokens) -> Int[Tensor, "batch 1"]:
    blocks = tokens.blocks(rows_per_pass(tokens.ids.shape[1]))
    parts = [model.run(tokens.rows(block)).last_logits.argmax(-1) for block in blocks]
    return torch.cat(parts)[:, None].cpu()


class Interchange:
    """Some pairs, both runs at the swapped positions, and the edits that exchange them.

    Args:
        model: The model.
        encoded: The pairs, with answers.
        sites: Where.
        spots: The position of each row, see `spots`.
        batch_size: Rows of one pass of a sweep.

    Attributes:
        base: What the clean run holds, per site: `[row d]`, or `[row pos d]` for all positions.
        source: What the contrast run holds.
        clean: Logit difference of the clean run, answers minus wrong.
        contrast: The same of the contrast run.
        reached: Whether the contrast run's top token is its answer.
        right: Whether the clean run's is.
    """

    def __init__(
        self,
        model: Model,
        encoded: EncodedPairs,
        sites: Sequence[Site],
        spots: list[int] | None,
        *,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.pairs, self.spots, self.batch_size = model, encoded, spots, batch_size
        self.base, logits = self._record(encoded.clean, sites)
        self.clean = logit_diff(logits, encoded.answers, encoded.wrong).double()
        self.right = _hits(logits, encoded.answers)
        self.source, logits = self._record(encoded.contrast, sites)
        self.contrast = logit_diff(logits, encoded.answers, encoded.wrong).double()
        self.reached = _hits(logits, encoded.wrong)

    def __len__(self) -> int:
        return len(self.pairs)

    def _record(
        self, tokens: Tokens, sites: Sequence[Site]
    ) -> tuple[dict[Site, Tensor], Float[Tensor, "batch vocab"]]:
        kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
        logits = []
        for block in tokens.blocks(rows_per_pass(tokens.ids.shape[1])):
            part = tokens.rows(block)
            run = self.model.run(part, record=list(sites))
            rows = torch.arange(len(part))
            for site, parts in kept.items():
                found = run.aligned(site)
                if self.spots is not None:
                    own = [self.spots[row] for row in block]
                    found = found[rows, [p % n for p, n in zip(own, part.lengths, strict=True)]]
                parts.append(found.detach())
            logits.append(run.last_logits.detach().float().cpu())
        return {site: torch.cat(parts) for site, parts in kept.items()}, torch.cat(logits)

    def differences(self, site: Site) -> Float[Tensor, "n d"]:
        """Source minus base at every swapped position that can differ, in float64."""
        delta = (self.source[site].double() - self.base[site].double()).cpu()
        if self.spots is not None:
            return delta
        here = torch.arange(delta.shape[1])[None]
        first = torch.tensor(self.pairs.first_difference)[:, None]
        return delta[(here >= first) & (here < torch.tensor(self.pairs.clean.lengths)[:, None])]

    def same(self, site: Site) -> bool:
        """Whether both runs hold the same there, so that nothing can be exchanged."""
        size = float(self.base[site].double().norm(dim=-1).max())
        return float(self.differences(site).norm(dim=-1).max()) <= SAME * max(size, 1e-30)

    def tokens(self, rows: Sequence[int]) -> Tokens:
        """Some of the clean prompts."""
        index = list(rows)
        return Tokens(self.pairs.clean.ids[index], self.pairs.clean.mask[index])

    def places(self, rows: Sequence[int]) -> list[tuple[Where, list[int]]]:
        """Where a batch made of these rows is edited, and which of its rows that concerns."""
        if self.spots is None:
            return [(Where(), list(range(len(rows))))]
        own = [self.spots[row] for row in rows]
        found = []
        for spot in dict.fromkeys(own):
            members = [i for i, other in enumerate(own) if other == spot]
            found.append((Where(spot, rows=members if len(members) < len(own) else None), members))
        return found

    def _wide(self, values: Tensor) -> Tensor:
        """One vector per row at whatever position is asked for (no memory: a view)."""
        return values if values.ndim == 3 else values[:, None].expand(
            -1, self.pairs.clean.ids.shape[1], -1
        )  # fmt: skip

    def write(self, site: Site, values: Tensor, rows: Sequence[int]) -> list[Edit]:
        """Edits of a batch made of these rows that put `values` (one entry per row) there."""
        return [
            Edit(site, patch(self._wide(values[members])), where)
            for where, members in self.places(rows)
        ]

    def swap(self, site: Site, basis: Tensor | None) -> Plan:
        """The source's part along a basis for all rows; None: the whole activation."""
        rows, source = range(len(self)), self.source[site]
        if basis is None:
            return Plan(self.write(site, source, rows))
        basis = basis.to(source.device, torch.float32)
        return Plan(
            Edit(site, swap_subspace(basis, self._wide(source[members])), where)
            for where, members in self.places(rows)
        )

    def relabelled(self, labels: Int[Tensor, "batch m"]) -> "Interchange":
        """The same with other answers of the contrast."""
        other = copy.copy(self)
        other.pairs = replace(self.pairs, wrong=labels)
        return other

    def values(self, cells: Sequence[Plan]) -> Float[Tensor, "cell batch"]:
        """Logit difference, cell by cell."""
        answers, wrong = self.pairs.answers.cpu(), self.pairs.wrong.cpu()
        columns = logit_diff.needs_columns(answers, wrong)
        assert columns is not None
        answers, wrong = reindex(answers, columns), reindex(wrong, columns)

        def read(logits: Tensor) -> Tensor:
            n = len(logits) // len(self)
            return logit_diff(logits.cpu(), answers.repeat(n, 1), wrong.repeat(n, 1)).double()

        return self._swept(cells, read, columns)

    def hits(self, cells: Sequence[Plan]) -> Float[Tensor, "cell batch"]:
        """1 where the contrast's answer is the top token, else 0."""

        def read(logits: Tensor) -> Tensor:
            return _hits(logits.cpu(), self.pairs.wrong.repeat(len(logits) // len(self), 1))

        return self._swept(cells, read, None)

    def _swept(
        self, cells: Sequence[Plan], read: Callable[[Tensor], Tensor], columns: Tensor | None
    ) -> Float[Tensor, "cell batch"]:
        plain = len(cells) * self.pairs.clean.ids.shape[1] < _WORTH
        swept = sweep(
            self.model, self.pairs.clean, cells, read,
            batch_size=self.batch_size, columns=columns, share=not plain,
        )  # fmt: skip
        return swept.values.double().cpu()


def _hits(logits: Tensor, wanted: Tensor) -> Float[Tensor, " batch"]:
    return (logits.argmax(-1)[:, None] == wanted.cpu()).any(1).double()
