"""Models that show how they came to be: weights are kept all along their training.

Here is what their files share: the models of a run in order, and when a measure came to be.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.organisms.language import Language

__all__ = ["halfway", "history"]


def history(organism: "Language", model: "Model") -> "Iterator[tuple[int, Model]]":
    """Each kept step of the run that made a model, and the model as it was then.

    Args:
        organism: Whose model it is.
        model: Loaded from a folder with kept steps.
    """
    # A run that has just ended may lie elsewhere than the shipped weights.
    folder = Path(str(model.module.name_or_path))
    for step in organism.checkpoints(folder):
        yield step, organism.load(folder, step=step)


def halfway(series: Mapping[int, float]) -> int:
    """The step from which on a measure is past the middle between its first and its last value."""
    steps = sorted(series)
    first, last = series[steps[0]], series[steps[-1]]
    found = steps[-1]
    for step in reversed(steps):
        if (series[step] - first) / (last - first) < 0.5:
            break
        found = step
    return found
