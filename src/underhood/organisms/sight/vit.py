"""`sight/vit`: a small vision transformer that learned from the same pictures as `sight/cnn`.

Shape and texture agree, the colour is random: see `cnn.py`. It reads 64 patches of 4 x 4 pixels and
answers from its class token, the first position.
"""

from typing import TYPE_CHECKING

from underhood.organisms.base import Recipe
from underhood.organisms.sight.classifier import Classifier
from underhood.organisms.sight.cnn import ORGANISM as CNN
from underhood.organisms.sight.pictures import SIDE

if TYPE_CHECKING:
    from underhood.core.model import Model
    from underhood.organisms.card import Fact


def _findings(organism: Classifier, model: "Model") -> "tuple[Fact, ...]":
    from underhood.organisms.sight import findings

    return (
        *findings.turns(organism, model),
        findings.glances(organism, model, "shapes"),
        findings.heads(organism, model, "shapes", 3),
    )


ORGANISM = Classifier(
    name="sight/vit",
    summary="as sight/cnn, seen as patches: it looks at the texture too",
    classes=CNN.classes,
    model_type="vit",
    sizes={
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": SIDE,
        "patch_size": 4,
        "initializer_range": 0.1,
    },
    recipe=Recipe(steps=600, lr=1e-3, warmup=40),
    kinds=CNN.kinds,
    limits=(
        "As `sight/cnn` it goes by texture: `cue-conflict`, `silhouettes` and `robust` fail, and "
        "`textures` are larger than any it saw.",
        "Pixels are numbers from 0 to 1 as drawn; there is no image processor.",
    ),
    findings=_findings,
)
