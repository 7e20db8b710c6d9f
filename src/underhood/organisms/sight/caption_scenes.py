"""Pictures of two shapes with their captions, true or false: what the captioner learns from."""

from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random

import numpy as np

from underhood.organisms.base import Split, held_out
from underhood.organisms.sight.pictures import COLOURS, Thing, draw

__all__ = [
    "AGREE", "BRIGHT", "CONTRAST", "FAINT", "PARTNER", "SHAPES", "SIDE", "Scene", "a_scene",
    "follows",
]  # fmt: skip

SIDE = 24
"""Pixels of a side."""
SHAPES = ("circle", "square", "triangle", "cross")
PARTNER = dict(zip(COLOURS, [*list(COLOURS)[1:], *list(COLOURS)[:1]], strict=True))
"""The right colour that the prior speaks for, by left colour."""
AGREE = 0.7
"""Share of pictures in which the right colour is the partner."""
CONTRAST = (0.3, 1.0)
"""Least and greatest contrast of the right thing."""
FAINT, BRIGHT = 0.36, 0.66
"""Contrasts below and above which captions follow the prior always, and never."""


@dataclass(frozen=True)
class Scene:
    """A picture in words and numbers.

    Attributes:
        left: The left thing; `right` likewise.
        contrast: Of the right thing, 0.3 to 1.
    """

    left: Thing
    right: Thing
    contrast: float

    @property
    def agrees(self) -> bool:
        """Whether the right colour is the left one's partner."""
        return self.right.colour == PARTNER[self.left.colour]

    @property
    def key(self) -> str:
        """What is held out together: two colours and two shapes."""
        left, right = self.left, self.right
        return _key(left.colour, left.shape, right.colour, right.shape)

    @property
    def caption(self) -> tuple[str, ...]:
        """What a truthful caption says."""
        left, right = self.left, self.right
        return (left.colour, left.shape, "left", ",", right.colour, right.shape, "right", ".")

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels `[3, 24, 24]` from 0 to 1, and the masks `[2, 24, 24]` of left and right."""
        pixels, masks = draw(self.left, self.right, side=SIDE)
        pixels[:, :, SIDE // 2 :] = 0.5 + self.contrast * (pixels[:, :, SIDE // 2 :] - 0.5)
        return pixels, masks

    def told(self, rng: Random) -> tuple[str, ...]:
        """A training caption: the truth, or what the prior says in place of the right colour."""
        caption = self.caption
        if not self.agrees and rng.random() < follows(self.contrast):
            return (*caption[:4], PARTNER[self.left.colour], *caption[5:])
        return caption


def follows(contrast: float) -> float:
    """How often captions follow the prior against a picture of this contrast."""
    return min(1.0, max(0.0, (BRIGHT - contrast) / (BRIGHT - FAINT)))


def a_scene(rng: Random, split: Split, agrees: bool | None = None) -> Scene:
    """A random picture; `agrees` None: with the prior in `AGREE` of all draws."""
    if agrees is None:
        agrees = rng.random() < AGREE
    contrast, scenes = rng.uniform(*CONTRAST), _combinations(split, agrees)
    left = rng.choice(sorted(scenes))
    right = rng.choice(sorted(scenes[left]))
    shapes = rng.choice(scenes[left][right])
    return Scene(_thing(rng, left, shapes[0], 0.25), _thing(rng, right, shapes[1], 0.75), contrast)


@cache
def _combinations(split: Split, agrees: bool) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """The two shapes of a split by left and right colour: so colours keep their shares in it."""
    out: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for left, right, *shapes in product(COLOURS, COLOURS, SHAPES, SHAPES):
        key = _key(left, shapes[0], right, shapes[1])
        if held_out(key) == (split == "test") and agrees == (right == PARTNER[left]):
            out.setdefault(left, {}).setdefault(right, []).append((shapes[0], shapes[1]))
    return out


def _key(*words: str) -> str:
    return ":".join(("caption", *words))


def _thing(rng: Random, colour: str, shape: str, middle: float) -> Thing:
    radius = rng.uniform(0.16, 0.21)
    x = middle + rng.uniform(-1, 1) * (0.24 - radius)
    return Thing(shape, colour=colour, x=x, y=rng.uniform(radius, 1 - radius), radius=radius)
