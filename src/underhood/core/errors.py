"""Every refusal of underhood, as a typed error.

A message has four parts, each on its own line: what happened, what was given, why it cannot be, and
what to do now. `refusal` writes that form; no error is raised with a bare string. Each error also
derives from the builtin that a caller would expect (`ValueError`, `KeyError`, ...), so code that
knows nothing of underhood can still catch it.
"""

import difflib
from collections.abc import Iterable


class UnderhoodError(Exception):
    """Root of all errors that underhood raises on purpose."""

    exit_code = 1

    def __init__(
        self, what: str, *, given: object = None, why: str | None = None, do: str | None = None
    ) -> None:
        self.what, self.given, self.why, self.do = what, given, why, do
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.given is not None:
            lines.append(f"  Given:   {self.given}")
        if self.why:
            lines.append(f"  Because: {self.why}")
        if self.do:
            lines.append(f"  Instead: {self.do}")
        return "\n".join(lines)


class UsageError(UnderhoodError, ValueError):
    """The call itself is wrong: a bad name, shape, range or combination of arguments."""

    exit_code = 2


class NotOffered(UnderhoodError, NotImplementedError):
    """The model is fine and the call is fine, but this model has no such thing."""

    exit_code = 3


class SiteNotFound(UsageError, KeyError):
    """No site of this name, layer or unit exists (in general, or in this model)."""


class OutOfRange(UsageError, IndexError):
    """A layer, head, expert, neuron, position or row number that the model or prompt lacks."""


class ShapeMismatch(UsageError):
    """A tensor whose shape, dtype or device does not fit the place it is meant for."""


class EmptyPrompt(UsageError):
    """A prompt without tokens."""


class PromptTooLong(UsageError):
    """A prompt longer than the model's context."""


class PaddingError(UsageError):
    """A batch that needs padding without a pad token, or padded ids without an attention mask."""


class PairError(UsageError):
    """Pairs of prompts that cannot be compared: unequal lengths, identical, or bad answers."""


class AnswerError(UsageError):
    """An answer that is not one token of the vocabulary."""


class PlanError(UsageError):
    """An edit plan that cannot be read, or that was made for another model."""


class FileProblem(UsageError, OSError):
    """A file or folder that is missing, truncated, or not what its name says."""

    def __str__(self) -> str:
        return UnderhoodError.__str__(self)


class ModelNotFound(FileProblem):
    """No model under this name, neither built in, nor on disk, nor in the cache or hub."""


class UntrustedCode(UsageError):
    """The model folder brings its own Python code, and nobody allowed it to run."""


class EditNeverFired(UnderhoodError, RuntimeError):
    """An edit was asked for and changed nothing, because its place never came up in the pass."""


class SiteNeverFired(UnderhoodError, RuntimeError):
    """A recording was asked for and the model never passed that place."""


class MemoryTooSmall(UsageError, MemoryError):
    """A job of which not even the smallest part fits into the memory that it may use."""


class Stopped(UnderhoodError, RuntimeError):
    """A long job that was stopped on request, between two of its passes.

    Attributes:
        done: Parts of the job that are done (and kept, where the job was given a place for them).
        total: Parts in all.
    """

    done = 0
    total = 0


class NotFinite(UnderhoodError, ArithmeticError):
    """Activations, logits or scores that are NaN or infinite where numbers were due."""


class SelfCheckFailed(UnderhoodError, AssertionError):
    """`model.check()` found that a site does not mean what its name says in this model."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The `n` closest names, comma separated, or all of a short list when none is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    return ", ".join(close or names[:12])
