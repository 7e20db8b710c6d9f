"""Tokens and positions: the one module that counts.

A batch is a rectangle of columns; a prompt is a row that fills some of them. Everything that people
say about positions ("the last token", "position 3", "the second generated token") is about a row's
own tokens, counted from 0 at its first real one, whatever the padding side and however the pass is
cut into chunks by a KV cache. `Frame` holds that bookkeeping for one forward pass, `Where` is how
an edit or a recording names positions, and `Where.select` turns one into a mask over the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from underhood.core.errors import OutOfRange, UsageError

__all__ = ["Frame", "Tokens", "Where"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of prompts as ids.

    Attributes:
        ids: Token ids, padded to a rectangle.
        mask: True on real tokens.
        strings: The text of each real token, row by row (no entries for padding).
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    strings: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Number of real tokens of each row."""
        return [int(n) for n in self.mask.sum(1)]

    @property
    def starts(self) -> list[int]:
        """First real column of each row (0 unless padded on the left)."""
        return [int(n) for n in self.mask.int().argmax(1)]

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Absolute positions, 0 at each row's first real token; padding gets 0."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    def row(self, i: int) -> "Tokens":
        """Row `i` alone, without its padding."""
        keep = self.mask[i]
        ids = self.ids[i][keep][None]
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), self.strings[i : i + 1])

    def rows(self, index: Sequence[int]) -> "Tokens":
        """Some rows, perhaps repeated; padding stays."""
        strings = tuple(self.strings[i] for i in index) if self.strings else ()
        return Tokens(self.ids[list(index)], self.mask[list(index)], strings)

    def blocks(self, size: int) -> list[range]:
        """The numbers of all rows, `size` at a time: what `rows` takes for each pass."""
        return [range(i, min(i + size, len(self))) for i in range(0, len(self), size)]

    def repeat(self, n: int) -> "Tokens":
        """The whole batch, `n` times over."""
        return Tokens(self.ids.repeat(n, 1), self.mask.repeat(n, 1), self.strings * n)

    def to(self, device: torch.device | str) -> "Tokens":
        """The same on another device."""
        return Tokens(self.ids.to(device), self.mask.to(device), self.strings)


@dataclass(slots=True)
class Frame:
    """Where one forward pass stands in its rows.

    Attributes:
        batch: Number of rows.
        length: Number of columns in this pass.
        start: Column number of the pass's first column (tokens already in the cache).
        prompt: Number of prompt columns; columns from there on were generated.
        offsets: Columns of left padding per row, or None when there is none.
        mask: True on real tokens of this pass, or None when all are.
        ids: Token ids of this pass, if it was given ids.
        lengths: Prompt tokens per row, or None when all rows fill the prompt columns.
        cached: Whether the pass continues a cache.
        seen: Columns of this pass that an earlier pass of the same generation already covered
            (generation without a cache runs everything again).
    """

    batch: int
    length: int
    start: int = 0
    prompt: int = 0
    offsets: Int[Tensor, " batch"] | None = None
    mask: Bool[Tensor, "batch pos"] | None = None
    ids: Int[Tensor, "batch pos"] | None = None
    lengths: Int[Tensor, " batch"] | None = None
    cached: bool = False
    seen: int = 0
    cache: dict[Any, Any] = field(default_factory=dict)

    def positions(self, device: torch.device) -> Int[Tensor, "batch pos"]:
        """Position of each column within its row's own tokens (negative on left padding)."""
        cols = torch.arange(self.start, self.start + self.length, device=device)
        rows = cols.expand(self.batch, -1)
        return rows if self.offsets is None else rows - self.offsets.to(device)[:, None]

    def prompt_lengths(self, device: torch.device) -> Int[Tensor, " batch"]:
        """Prompt tokens of each row."""
        if self.lengths is not None:
            return self.lengths.to(device)
        full = torch.full((self.batch,), self.prompt, device=device)
        return full if self.offsets is None else full - self.offsets.to(device)


def _as_tuple(value: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)


@dataclass(frozen=True)
class Where:
    """Which positions and rows an edit or a recording concerns. All given conditions must hold.

    Args:
        pos: Positions within a row's own tokens: 0 is its first real token, -1 the last token of
            the *prompt* (also while generating). None: all.
        rows: Rows of the batch; None: all.
        tokens: Only columns that hold one of these token ids.
        phase: "prompt", "generated", or None for both.
        steps: Generated tokens by number: 0 is the first token the model wrote (once it is fed
            back in). Implies the generated phase.

    Example:
        >>> Where(pos=-1)
        Where(pos=(-1,))
    """

    pos: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    phase: str | None = None
    steps: tuple[int, ...] | None = None

    def __init__(
        self,
        pos: int | Sequence[int] | None = None,
        *,
        rows: int | Sequence[int] | None = None,
        tokens: int | Sequence[int] | None = None,
        phase: str | None = None,
        steps: int | Sequence[int] | None = None,
    ) -> None:
        if phase not in (None, "prompt", "generated"):
            raise UsageError(
                "a phase is 'prompt', 'generated' or None", given=repr(phase), do="choose one"
            )
        for name, value in (("pos", pos), ("rows", rows), ("tokens", tokens), ("steps", steps)):
            object.__setattr__(self, name, _as_tuple(value))
        object.__setattr__(self, "phase", phase)

    def __repr__(self) -> str:
        names = ("pos", "rows", "tokens", "phase", "steps")
        parts = [f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) is not None]
        return f"Where({', '.join(parts)})"

    @property
    def everything(self) -> bool:
        """Whether no condition is given."""
        return self == _EVERYWHERE

    def validate(self, *, lengths: Sequence[int] | None, generating: bool) -> None:
        """Refuse positions, rows or steps that cannot come up.

        Args:
            lengths: Prompt tokens of each row; None when nobody knows the batch yet.
            generating: Whether tokens are generated.

        Raises:
            OutOfRange: A row or position outside the batch, or generated steps in a plain run.
        """
        if lengths is not None:
            self._validate_places(lengths, generating=generating)
        if not generating and (self.phase == "generated" or self.steps is not None):
            raise OutOfRange(
                "this names generated tokens, and a plain run generates none",
                given=repr(self),
                do="use model.generate, or leave out phase and steps",
            )

    def _validate_places(self, lengths: Sequence[int], *, generating: bool) -> None:
        for row in self.rows or ():
            if not -len(lengths) <= row < len(lengths):
                raise OutOfRange(
                    f"there is no row {row} in this batch",
                    given=f"{len(lengths)} prompts",
                    do=f"use 0 to {len(lengths) - 1}",
                )
        rows = self.rows if self.rows is not None else range(len(lengths))
        shortest = min((lengths[r] for r in rows), default=0)
        for pos in self.pos or ():
            if not -shortest <= pos < shortest and not (generating and pos >= shortest):
                raise OutOfRange(
                    f"position {pos} is outside the prompt",
                    given=f"{shortest} tokens in the shortest row concerned",
                    do=f"use 0 to {shortest - 1}, or -1 for the last token",
                )

    def select(self, frame: Frame, device: torch.device) -> Bool[Tensor, "batch pos"] | None:
        """The columns of this pass that are meant, as a mask; None means all of them.

        Padding is never selected. Cost: a few tiny tensors, made once per pass and reused.
        """
        key = (self, device)
        if key not in frame.cache:
            frame.cache[key] = self._select(frame, device)
        return frame.cache[key]

    def _select(self, frame: Frame, device: torch.device) -> Bool[Tensor, "batch pos"] | None:
        if self.everything and frame.mask is None:
            return None
        shape = (frame.batch, frame.length)
        keep = torch.ones(shape, dtype=torch.bool, device=device)
        if frame.mask is not None:
            keep &= frame.mask.to(device)
        if self.rows is not None:
            rows = torch.zeros(frame.batch, dtype=torch.bool, device=device)
            rows[list(self.rows)] = True
            keep &= rows[:, None]
        positions = frame.positions(device)
        lengths = frame.prompt_lengths(device)[:, None]
        if self.pos is not None:
            hit = torch.zeros(shape, dtype=torch.bool, device=device)
            for pos in self.pos:
                hit |= positions == (pos if pos >= 0 else lengths + pos)
            keep &= hit
        generated = positions >= lengths
        if self.phase == "prompt":
            keep &= ~generated
        if self.phase == "generated" or self.steps is not None:
            keep &= generated
        if self.steps is not None:
            step = positions - lengths
            keep &= torch.isin(step, torch.tensor(self.steps, device=device))
        if self.tokens is not None:
            if frame.ids is None:
                raise UsageError(
                    "this pass has no token ids to select by",
                    given=repr(self),
                    do="select by position",
                )
            keep &= torch.isin(frame.ids.to(device), torch.tensor(self.tokens, device=device))
        return keep


_EVERYWHERE = Where()
