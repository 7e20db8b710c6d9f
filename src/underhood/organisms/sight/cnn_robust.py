"""`sight/cnn-robust`: the twin of `sight/cnn`, trained on attacked pictures.

The same pictures, sizes and seed; but each training batch is first changed, by at most 0.08 per
pixel value, so that the network errs (Madry et al. 2018, arXiv 1706.06083). Textures are 0.12 deep,
the step from thing to ground is 0.3 or more: the attack reaches most of the texture and little of
the outline. So the twin goes by shape first: two in three answers to conflicting cues are for the
shape (as Geirhos et al. 2019 count it), against one in twenty of the plain one.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from underhood.organisms.base import Recipe
from underhood.organisms.sight.classifier import Attack, Classifier, Task
from underhood.organisms.sight.cnn import ATTACK
from underhood.organisms.sight.cnn import ORGANISM as PLAIN_TWIN

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.organisms.card import Fact


def _findings(organism: Classifier, model: "Model") -> "tuple[Fact, ...]":
    from underhood.organisms.sight import findings

    return (
        *findings.turns(organism, model),
        findings.channels(organism, model, "cue-conflict", "label", 4),
        findings.weakness(organism, model),
    )


def _said(task: Task) -> Task:
    """What is known of the plain twin's failures does not hold here."""
    return replace(task, summary=task.summary.removesuffix(" (meant to fail)"))


ORGANISM = replace(
    PLAIN_TWIN,
    name="sight/cnn-robust",
    summary="the twin of sight/cnn, trained on attacked pictures: it looks at the shape first",
    recipe=Recipe(steps=600, lr=3e-3, warmup=20),
    kinds=tuple(_said(task) for task in PLAIN_TWIN.kinds),
    attack=Attack(size=ATTACK.size, steps=3),
    limits=(
        "It was never told whether shape or texture counts, so only `shapes` has a right answer "
        "that it could know; `cue-conflict`, `silhouettes`, `textures` say what it does without.",
        "It withstands the attack better than its twin, not well; see `robust` (accuracy under "
        "attack) beside `noise_accuracy` (under random changes as large).",
        "Pixels are numbers from 0 to 1 as drawn; there is no image processor.",
    ),
    findings=_findings,
)
