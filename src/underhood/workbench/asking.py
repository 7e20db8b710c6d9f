"""What a page may say: pydantic classes, and their complaints as our errors.

Everything is refused here that can be refused without the model: an unknown field, a wrong type, a
number that is none, more than the server takes.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from underhood.core.errors import UsageError, nearest
from underhood.view.schema import first_reason

__all__ = ["Asked", "Many", "Prompt", "Short", "validated"]

Short = Annotated[str, Field(max_length=200)]
"""A name, a token, a number as text."""
Prompt = Annotated[str, Field(max_length=200_000)]
"""A text that a model reads; how many tokens it takes, the model says."""
Many = Annotated[list[Prompt], Field(max_length=1000)]


class Asked(BaseModel):
    """Base of all that is asked: immutable, no unknown fields, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_A = TypeVar("_A", bound=Asked)


def validated(kind: type[_A], said: Any) -> _A:
    """What was said, as a request.

    Raises:
        UsageError: It does not fit.
    """
    try:
        return kind.model_validate(said)
    except ValidationError as problem:
        extra = [e["loc"][-1] for e in problem.errors() if e["type"] == "extra_forbidden"]
        raise UsageError(
            "the request does not fit",
            given=str(sorted(said))[:200] if isinstance(said, dict) else type(said).__name__,
            why=first_reason(problem)[:300],
            do=f"nearest: {nearest(str(extra[0]), kind.model_fields)}" if extra else None,
        ) from None
