"""Tasks on drawn shapes: which cue tells the class, and what the contrast changes.

Shape, texture and colour are named in `pictures`; class i is shape i, and in some tasks texture i.
Held out together: all pictures of one colour in one quarter of the picture, in every task; so a
picture and its contrast, which have both in common, are in the same split. Of the 24 colours and
quarters, five are held out.
"""

from random import Random

from underhood.organisms.sight.classifier import Case
from underhood.organisms.sight.pictures import (
    COLOURS,
    EVERYWHERE,
    PLAIN,
    SHAPES,
    TEXTURES,
    Scene,
    a_scene,
)

__all__ = ["agreeing", "conflicting", "shapes", "silhouettes", "textures"]

# Parts of the picture along a side. Things keep within it, so their middles lie in the inner two.
_PARTS = 4


def agreeing(rng: Random) -> Case:
    """Shape and texture say the same. Contrast: another class, so both change."""
    label, wrong = rng.sample(range(len(SHAPES)), 2)
    scene = _scene(rng, SHAPES[label], TEXTURES[label])
    other = scene.but(shape=SHAPES[wrong], texture=TEXTURES[wrong])
    return Case(scene, label, other, wrong, _key(scene))


def conflicting(rng: Random) -> Case:
    """The shape of one class, the texture of another; the shape counts. Contrast: another shape."""
    label, wrong, rival = rng.sample(range(len(SHAPES)), 3)
    scene = _scene(rng, SHAPES[label], TEXTURES[rival])
    return Case(scene, label, scene.but(shape=SHAPES[wrong]), wrong, _key(scene), rival)


def silhouettes(rng: Random) -> Case:
    """A shape without texture. Contrast: another shape."""
    return _shape(rng, PLAIN)


def shapes(rng: Random) -> Case:
    """A shape of any texture, or none, which says nothing. Contrast: another shape."""
    return _shape(rng, rng.choice((*TEXTURES, PLAIN)))


def textures(rng: Random) -> Case:
    """A texture that fills the picture. Contrast: another texture."""
    label, wrong = rng.sample(range(len(TEXTURES)), 2)
    scene = _scene(rng, EVERYWHERE, TEXTURES[label])
    return Case(scene, label, scene.but(texture=TEXTURES[wrong]), wrong, _key(scene))


def _shape(rng: Random, texture: str) -> Case:
    label, wrong = rng.sample(range(len(SHAPES)), 2)
    scene = _scene(rng, SHAPES[label], texture)
    return Case(scene, label, scene.but(shape=SHAPES[wrong]), wrong, _key(scene))


def _scene(rng: Random, shape: str, texture: str) -> Scene:
    return a_scene(rng, shape, texture, rng.choice(tuple(COLOURS)))


def _key(scene: Scene) -> str:
    thing = scene.thing
    return f"shapes:{thing.colour}:{int(_PARTS * thing.x)}:{int(_PARTS * thing.y)}"
