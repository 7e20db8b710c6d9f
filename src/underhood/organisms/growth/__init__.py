"""Models that show how they came to be: weights are kept all along their training.

Here is what their files share: the sizes of two layers of attention, the models of a run in order,
and when a measure came to be.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.organisms.language import Language

__all__ = ["SIZES", "halfway", "history"]

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    # A Llama, for its MLP can be as small as this and its rotary positions find the word before at
    # any place alike; few words are far apart here, so that they turn fast.
    "intermediate_size": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": False,
}


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
