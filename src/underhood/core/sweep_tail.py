"""The end of a sweep's passes: all logits at the last token, or only the columns that are read.

A logit difference reads two columns of tens of thousands. `Tail` has the model's own head compute
only those, for as long as a pass takes: the head module multiplies by the rows of its weight that
were asked for, and whatever the model does to the logits after it (a scale, a soft cap) happens to
them as it would to all. That is proved once per model against its full logits. Where the head is
not a plain linear map, is hooked, or the proof fails, all logits are made and the columns taken.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from underhood.core.errors import OutOfRange, UsageError
from underhood.core.model import Model
from underhood.core.taps.patches import evaluating, patched

__all__ = ["Tail"]

TOLERANCE = 1e-4  # of the largest logit, or a few roundings of a coarser precision

Rows = tuple[Tensor, Tensor | None]
_ROWS: ContextVar[Rows | None] = ContextVar("underhood_head_rows", default=None)
_PROVEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Tail:
    """Which logits a sweep's passes make.

    Args:
        model: The model.
        columns: Ids of the vocabulary that are read; None: all.
        whole: Make all logits in any case (they are edited, or the head is).

    Raises:
        UsageError: No columns, or more than one axis of them.
        OutOfRange: An id that the head does not have.
    """

    def __init__(
        self, model: Model, columns: Int[Tensor, "..."] | None = None, *, whole: bool = False
    ) -> None:
        self.columns: Tensor | None = None
        self._rows: Rows | None = None
        self._head: nn.Linear | None = None
        if columns is None:
            return
        if columns.ndim != 1 or not len(columns) or columns.dtype in (torch.bool, torch.uint8):
            raise UsageError(
                "columns are a list of token ids",
                given=f"shape {list(columns.shape)}, {columns.dtype}",
                do="give ids [n] (metric.needs_columns(answers, wrong)), or None for all logits",
            )
        head = _linear(model)
        vocab = head.weight.shape[0] if head is not None else None
        if int(columns.min()) < 0 or (vocab is not None and int(columns.max()) >= vocab):
            raise OutOfRange(
                "a column is not a token of this model",
                given=f"ids from {int(columns.min())} to {int(columns.max())}",
                do=f"use 0 to {vocab - 1}" if vocab else "use ids from 0",
            )
        self.columns = columns.long().to(model.device)
        if head is not None and not whole and 2 * len(columns) <= head.weight.shape[0]:
            with torch.no_grad():
                bias = None if head.bias is None else head.bias[self.columns]
                self._rows = head.weight[self.columns], bias
            self._head = head
            if not self._proven(model):
                self._rows = self._head = None

    @property
    def narrow(self) -> bool:
        """Whether only the columns are computed (and not all logits, of which they are taken)."""
        return self._rows is not None

    def pick(self, logits: Tensor) -> Tensor:
        """The columns of a pass's logits, whichever way it made them."""
        if self.columns is None:
            return logits
        if self.narrow and logits.shape[-1] == len(self.columns):  # then all are twice as many
            return logits
        return logits[..., self.columns.to(logits.device)]

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Have the head compute only the columns inside the block, in this thread."""
        if self._rows is None or self._head is None:
            yield
            return
        with patched(self._head, "forward", _wrap):
            token = _ROWS.set(self._rows)
            try:
                yield
            finally:
                _ROWS.reset(token)

    def _proven(self, model: Model) -> bool:
        """Whether the columns alone come out as they do among all; tried once per model."""
        if model.module not in _PROVEN:
            _PROVEN[model.module] = self._agrees(model)
        return _PROVEN[model.module]

    def _agrees(self, model: Model) -> bool:
        _, given = model.batch(torch.arange(3)[None])
        with evaluating(model.module), torch.no_grad():
            full = model._forward(given).logits
            try:
                with self.narrowed():
                    some = model._forward(given).logits
            except (RuntimeError, ValueError, IndexError):
                return False  # the model counts on the whole vocabulary
        assert self.columns is not None
        if some.shape != (*full.shape[:-1], len(self.columns)):
            return False
        gap = (full[..., self.columns].float() - some.float()).abs().max()
        slack = max(TOLERANCE, 4 * torch.finfo(full.dtype).eps)
        return bool(gap <= slack * full.float().abs().max().clamp(min=1.0))


def _linear(model: Model) -> nn.Linear | None:
    """The head, if it is a plain linear map that nobody listens to."""
    path = model.anatomy.head
    head = model.module.get_submodule(path) if path is not None else None
    if type(head) is not nn.Linear or "forward" in vars(head) or head.weight.is_meta:
        return None
    plain = type(head.weight) in (nn.Parameter, Tensor) and head.weight.is_floating_point()
    listened = head._forward_hooks or head._forward_pre_hooks
    return head if plain and not listened else None


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = _ROWS.get()
        if rows is None or len(args) != 1 or kwargs:
            return original(*args, **kwargs)
        return F.linear(args[0], *rows)

    return forward
