"""A random sequence that starts again: the task by which heads that copy are grown and found."""

from collections.abc import Sequence
from random import Random

from underhood.organisms.language import Case

__all__ = ["repeated"]


def repeated(rng: Random, words: Sequence[str], length: int, task: str = "induction") -> Case:
    """So many different words, and their first ones again.

    Contrast: the deciding word is another, the first time.
    """
    *once, other = rng.sample(words, length + 1)
    shown = rng.randint(1, length - 1)
    changed = [*once[:shown], other, *once[shown + 1 :]]
    key = f"{task}:{':'.join(once)}"
    return Case(
        words=(*once, *once[:shown]),
        answer=once[shown],
        contrast=(*changed, *once[:shown]),
        wrong=other,
        key=key,
        contrast_key=key,
        judged=shown,
        after=tuple(once[shown + 1 :]),
    )
