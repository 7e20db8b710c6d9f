"""What this floor asks of a model: three questions that a tokenizer can answer."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from underhood.core.tokens import Tokens

__all__ = ["Answer", "Reads"]

Answer: TypeAlias = str | int
"""One answer: its text, or its token id in the vocabulary of the model that will be asked."""


@runtime_checkable
class Reads(Protocol):
    """Turns text into tokens, the way one model wants it."""

    def tokens(self, prompts: str | Sequence[str]) -> Tokens:
        """The prompts as one batch, with this model's BOS and padding; strings are filled in."""
        ...

    def token_id(self, text: str) -> int:
        """The id of the one token that is this text, without BOS.

        Raises:
            AnswerError: The text is not exactly one token.
        """
        ...

    def token_text(self, id: int, /) -> str:
        """The text of one token.

        Raises:
            UnderhoodError: The vocabulary has no such id.
        """
        ...
