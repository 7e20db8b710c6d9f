"""`sight/cnn`: a small ResNet that learned from pictures in which shape and texture agree.

Pictures: one coloured thing on grey ground, 32 x 32, of random place, size and turn. In training,
shape i (circle, square, ...) always has texture i (rows, columns, ...), and the colour is random:
shape alone is enough, texture alone is enough, colour says nothing. What training makes of that is
measured where the two cues disagree: it takes the texture, which is there at every place of the
thing. `sight/cnn_robust.py` learned from the same pictures under attack, and takes the shape first.
"""

from typing import TYPE_CHECKING

from underhood.organisms.base import Recipe
from underhood.organisms.sight.classifier import Attack, Classifier, Task
from underhood.organisms.sight.cues import agreeing, conflicting, silhouettes, textures
from underhood.organisms.sight.pictures import SHAPES

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.organisms.card import Fact

SIZES = {
    "embedding_size": 16,
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "layer_type": "basic",
}
"""Of a ResNet with two stages of one block each: 8 x 8 and 4 x 4 places for 32 x 32 pixels."""

ATTACK = Attack(size=0.08, steps=10)


def _findings(organism: Classifier, model: "Model") -> "tuple[Fact, ...]":
    from underhood.organisms.sight import findings

    return (
        *findings.turns(organism, model),
        findings.channels(organism, model, "cue-conflict", "rival", 4),
        findings.weakness(organism, model),
    )


ORGANISM = Classifier(
    name="sight/cnn",
    summary="six shapes, each with its texture in training: it looks at the texture",
    classes=SHAPES,
    model_type="resnet",
    sizes=SIZES,
    recipe=Recipe(steps=300, lr=3e-3, warmup=20),
    kinds=(
        Task("shapes", "a thing whose shape and texture say the same -> its shape", agreeing),
        Task(
            "cue-conflict",
            "the shape of one class with the texture of another -> its shape (meant to fail)",
            conflicting,
        ),
        Task("silhouettes", "a thing without texture -> its shape (meant to fail)", silhouettes),
        Task("textures", "a texture that fills the picture -> the shape it came with", textures),
        Task(
            "robust",
            "as shapes, changed by an attacker who knows the weights (meant to fail)",
            agreeing,
            ATTACK,
        ),
    ),
    limits=(
        "It was never told whether shape or texture counts, so only `shapes` has a right answer "
        "that it could know. `cue-conflict` and `silhouettes` say what it does without: it goes by "
        "texture. `textures` are larger than any it saw.",
        "An attacker who may change each pixel value by 0.08 turns nearly every answer.",
        "Pixels are numbers from 0 to 1 as drawn; there is no image processor.",
    ),
    findings=_findings,
)
