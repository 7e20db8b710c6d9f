"""What a metric is: a name, one function of logits at the answer position, and what it reads.

The checks live here, so that a metric's function is its formula and nothing else; the metrics
themselves are in `metrics`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from underhood.core.errors import NotFinite, OutOfRange, PairError, ShapeMismatch

__all__ = ["Asked", "Metric", "reindex"]

_MEANING = {"answers": "answers", "wrong": "wrong answers"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a metric's function gets: checked, on one device, in float32 or float64.

    Attributes:
        logits: Logits at the answer position.
        answers: Ids of the answers, padded with -1.
        wrong: Ids of the wrong answers, padded with -1.
        reference: Logits to compare with (for metrics that do not compare: `logits` again).
    """

    logits: Float[Tensor, "batch vocab"]
    answers: Int[Tensor, "batch n"]
    wrong: Int[Tensor, "batch m"]
    reference: Float[Tensor, "batch vocab"]


_Function: TypeAlias = Callable[[Asked], Tensor]


@dataclass(frozen=True, slots=True)
class Metric:
    """A named function of logits. Your own: `Metric("name", function, unit=..., about=...)`.

    Args:
        name: The name under which results show it.
        function: From `Asked` to one number per row; higher supports the answer.
        unit: "logits", "nats", "probability" or "rank".
        about: One sentence.
        uses_answers: Whether it needs answers.
        uses_wrong: Whether it needs wrong answers.
        uses_reference: Whether it needs reference logits.
        uses_all: Whether it reads the whole vocabulary, not only the columns of the answers.
        differentiable: Whether gradients mean something.
    """

    name: str
    function: _Function
    unit: str
    about: str
    uses_answers: bool = True
    uses_wrong: bool = False
    uses_reference: bool = False
    uses_all: bool = True
    differentiable: bool = True

    def __call__(
        self,
        logits: Float[Tensor, "batch vocab"],
        answers: Int[Tensor, "#batch n"] | None = None,
        wrong: Int[Tensor, "#batch m"] | None = None,
        *,
        reference: Float[Tensor, "#batch vocab"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """One number per row, in `unit`; higher supports the answer.

        Args:
            logits: Logits at the answer position.
            answers: Ids, padded with -1; a single row holds for the whole batch.
            wrong: Ids, padded with -1; a single row holds for the whole batch.
            reference: Logits of the pass to compare with; a single row holds for all.

        Raises:
            NotFinite: NaN or infinite logits.
            PairError: Answers, wrong answers or reference logits are needed and absent.
            OutOfRange: An id outside the vocabulary.
            ShapeMismatch: Another number of rows or columns than `logits` has.
        """
        if logits.ndim != 2:
            raise ShapeMismatch(
                "a metric reads the logits at the answer position",
                given=f"logits of shape {list(logits.shape)}",
                do="take the last position first: logits[:, -1]",
            )
        now = self._finite(logits, "logits")
        asked = Asked(
            now,
            self._ids(answers, now, "answers", self.uses_answers),
            self._ids(wrong, now, "wrong", self.uses_wrong),
            self._compared(reference, now),
        )
        return self.function(asked)

    def needs_columns(
        self, answers: Int[Tensor, "batch n"], wrong: Int[Tensor, "batch m"] | None = None
    ) -> Int[Tensor, " column"] | None:
        """Ids of the vocabulary columns that this metric reads, ascending; None for all.

        With these, logits of the other columns need not be computed: multiply with those rows of
        the unembedding and give `reindex(answers, columns)` instead of `answers`.

        Example:
            >>> from underhood.data.metrics import logit_diff
            >>> logit_diff.needs_columns(torch.tensor([[7]]), torch.tensor([[2, -1]]))
            tensor([2, 7])
        """
        # A metric that reads no answers has no columns to name.
        if self.uses_all or not (self.uses_answers or self.uses_wrong):
            return None
        read = [answers] if self.uses_answers else []
        if self.uses_wrong and wrong is not None:
            read.append(wrong)
        ids = torch.cat([part.flatten().long() for part in read or [answers[:0]]])
        return ids[ids >= 0].unique()

    def numbered(
        self,
        columns: Int[Tensor, " column"] | None,
        answers: Int[Tensor, "batch n"],
        wrong: Int[Tensor, "batch m"],
    ) -> tuple[Int[Tensor, "batch _"], Int[Tensor, "batch _"]]:
        """The answers as numbers of the columns from `needs_columns`, for logits of only these.

        What this metric does not read is left out; None: all columns, nothing changes.
        """
        if columns is None:
            return answers, wrong
        return (
            reindex(answers, columns) if self.uses_answers else answers[:, :0],
            reindex(wrong, columns) if self.uses_wrong else wrong[:, :0],
        )

    def __str__(self) -> str:
        return self.name

    def _finite(self, logits: Tensor, what: str) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        good = torch.isfinite(logits).all(1)
        if not bool(good.all()):
            rows = (~good).nonzero().flatten().tolist()
            raise NotFinite(
                f"the {what} hold NaN or infinite numbers",
                given=f"metric {self.name}, {len(rows)} of {len(good)} rows, first row {rows[0]}",
                why="no metric of them means anything",
                do="look for an edit that is too strong or a model in float16; try float32",
            )
        return logits

    def _compared(self, reference: Tensor | None, logits: Tensor) -> Tensor:
        if not self.uses_reference:
            return logits
        if reference is None:
            raise PairError(
                f"the metric {self.name} compares with another pass, and none was given",
                given="reference=None",
                do="give the unedited pass's logits: reference=clean_logits",
            )
        if reference.shape[1:] != logits.shape[1:] or len(reference) not in (1, len(logits)):
            raise ShapeMismatch(
                "the reference logits do not fit the logits",
                given=f"reference {list(reference.shape)}, logits {list(logits.shape)}",
                do="give one row, or one row per row of the logits, over the same vocabulary",
            )
        reference = self._finite(reference, "reference logits").to(logits.device)
        return reference.expand(len(logits), -1)

    def _ids(self, ids: Tensor | None, logits: Tensor, name: str, used: bool) -> Tensor:
        batch, vocab = logits.shape
        if not used:
            return torch.full((batch, 0), -1, device=logits.device)
        if ids is not None and len(ids) not in (1, batch):
            raise ShapeMismatch(
                f"`{name}` does not fit the logits",
                given=f"{len(ids)} rows of {name}, {batch} rows of logits",
                do="give one row of ids, or one per row of the logits",
            )
        empty = [0] if ids is None else (~(ids >= 0).any(1)).nonzero().flatten().tolist()
        if ids is None or empty:
            raise PairError(
                f"the metric {self.name} needs {_MEANING[name]}, and row {empty[0]} has none",
                given=f"{name}=None" if ids is None else f"{len(empty)} of {len(ids)} rows empty",
                do="complete the pairs with pairs.with_answers(answers, wrong)"
                + ("; or use logit or log_prob, which need no wrong answers" * (name == "wrong")),
            )
        if ids.numel() and int(ids.max()) >= vocab:
            raise OutOfRange(
                f"`{name}` holds an id outside the vocabulary",
                given=f"id {int(ids.max())}, {vocab} columns of logits",
                do="encode the pairs with the model that made the logits; for selected columns"
                " give reindex(ids, columns)",
            )
        return ids.long().to(logits.device).expand(batch, -1)


def reindex(ids: Int[Tensor, "batch n"], columns: Int[Tensor, " column"]) -> Int[Tensor, "batch n"]:
    """The ids as numbers of the selected columns; padding stays -1.

    Args:
        ids: Ids of the vocabulary, padded with -1.
        columns: Ascending ids of the selected columns, from `Metric.needs_columns`.

    Raises:
        OutOfRange: An id is not among the columns.

    Example:
        >>> reindex(torch.tensor([[7, -1]]), torch.tensor([2, 7]))
        tensor([[ 1, -1]])
    """
    ids, columns = ids.long(), columns.long().to(ids.device)
    if bool(((ids >= 0) & ~torch.isin(ids, columns)).any()):
        missing = ids[(ids >= 0) & ~torch.isin(ids, columns)]
        raise OutOfRange(
            "an id is not among the selected columns",
            given=f"id {int(missing[0])}, {len(columns)} columns",
            do="select the columns with needs_columns(answers, wrong) of the same metric",
        )
    return torch.searchsorted(columns, ids.contiguous()).masked_fill(ids < 0, -1)
