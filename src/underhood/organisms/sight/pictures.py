"""Drawn pictures: coloured, textured shapes on a grey ground, each with the mask of every shape.

    >>> thing = Thing("circle", "checks", "red")
    >>> pixels, masks = draw(thing, replace(thing, x=0.8), grain=3)
    >>> pixels.shape, masks.shape
    ((3, 32, 32), (2, 32, 32))

All that is random is in a `Thing` and in the arguments of `draw`, so a picture that differs in one
attribute only is `replace(thing, shape="square")`. Needs numpy alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from underhood.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "COLOURS", "EVERYWHERE", "GROUND", "PLAIN", "SHAPES", "SIDE", "TEXTURES", "PicturePairs",
    "Pictures", "Scene", "Thing", "a_scene", "a_thing", "draw",
]  # fmt: skip

Grid = np.ndarray

SIDE = 32
"""Pixels of a side, where nothing else is said."""

PLAIN, EVERYWHERE = "plain", "everywhere"
"""No texture; and no outline: the texture fills the picture."""

GROUND = (0.45, 0.55)
"""The ground's least and greatest grey."""

# Half the difference between a texture's light and dark, in pixel values from 0 to 1.
_CONTRAST = 0.12
# Pixels after which a texture repeats.
_PERIOD = 4.0
# Standard deviation of the noise over the whole picture.
_GRAIN = 0.02

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.85, 0.15),
    "blue": (0.15, 0.15, 0.85),
    "yellow": (0.85, 0.85, 0.15),
    "purple": (0.85, 0.15, 0.85),
    "cyan": (0.15, 0.85, 0.85),
}


def _circle(x: Grid, y: Grid) -> Grid:
    return np.hypot(x, y) - 1


def _square(x: Grid, y: Grid) -> Grid:
    return np.maximum(abs(x), abs(y)) - 0.85


def _triangle(x: Grid, y: Grid) -> Grid:
    return np.maximum(y - 0.6, abs(x) * 0.87 - (y + 1) * 0.5)


def _cross(x: Grid, y: Grid) -> Grid:
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(far - 1, near - 0.34)


def _ring(x: Grid, y: Grid) -> Grid:
    return abs(np.hypot(x, y) - 0.75) - 0.25


def _moon(x: Grid, y: Grid) -> Grid:
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.55, y))


def _everywhere(x: Grid, y: Grid) -> Grid:
    return np.full_like(x, -math.inf)


# Signed distance to the outline, negative inside, for a shape of radius 1; y goes down.
_OUTLINES: Mapping[str, Callable[[Grid, Grid], Grid]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
    EVERYWHERE: _everywhere,
}

# From -1 to 1, of the coordinates in periods.
_WEAVES: Mapping[str, Callable[[Grid, Grid], Grid]] = {
    "rows": lambda x, y: _wave(y),
    "columns": lambda x, y: _wave(x),
    "rising": lambda x, y: _wave((x + y) * math.sqrt(0.5)),
    "falling": lambda x, y: _wave((x - y) * math.sqrt(0.5)),
    "checks": lambda x, y: _wave(x / 1.5) * _wave(y / 1.5),
    "dots": lambda x, y: np.where(np.maximum(_wave(x), _wave(y)) < -0.3, 1.0, -0.4),
    PLAIN: lambda x, y: np.zeros_like(x),
}


def _wave(x: Grid) -> Grid:
    return np.clip(2 * np.sin(2 * math.pi * x), -1, 1)


SHAPES = tuple(name for name in _OUTLINES if name != EVERYWHERE)
TEXTURES = tuple(name for name in _WEAVES if name != PLAIN)


@dataclass(frozen=True)
class Thing:
    """What is drawn. Places and sizes are fractions of the picture's side.

    Attributes:
        shape: One of `SHAPES`, or `EVERYWHERE`.
        texture: One of `TEXTURES`, or `PLAIN`.
        colour: One of `COLOURS`.
        x: Its middle, from the left.
        y: Its middle, from the top.
        radius: Half its size.
        turn: By how much the outline (not the texture) is turned, in radians.
        phase: Where the texture begins, in periods to the right and down.
    """

    shape: str
    texture: str = PLAIN
    colour: str = "red"
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.3
    turn: float = 0.0
    phase: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for what, value, known in (
            ("shape", self.shape, _OUTLINES),
            ("texture", self.texture, _WEAVES),
            ("colour", self.colour, COLOURS),
        ):
            if value not in known:
                raise UsageError(f"no such {what}", given=value, do=f"use {nearest(value, known)}")


@dataclass(frozen=True)
class Scene:
    """A picture of one thing, not yet drawn.

    Attributes:
        thing: What is on it.
        light: The ground's grey.
        grain: Seed of the noise.
    """

    thing: Thing
    light: float
    grain: int

    @property
    def attributes(self) -> dict[str, Any]:
        """What is known of the picture, by name."""
        return {field.name: getattr(self.thing, field.name) for field in fields(self.thing)}

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels `[3, 32, 32]`, and the thing's mask `[32, 32]`."""
        pixels, masks = draw(self.thing, light=self.light, grain=self.grain)
        return pixels, masks[0]

    def but(self, **changes: Any) -> "Scene":
        """The same picture with these attributes of its thing changed."""
        return replace(self, thing=replace(self.thing, **changes))


class PicturePairs(NamedTuple):
    """Pictures and their contrasts, row by row."""

    clean: "Pictures"
    contrast: "Pictures"


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures with what is known of them.

    Attributes:
        pixels: `[n, 3, height, width]`, float32, from 0 to 1.
        labels: `[n]`, the right class of each.
        classes: Name of each class.
        masks: `[n, height, width]`, where the shape is; None where that is not known.
        rivals: `[n]`, the class that another cue speaks for (the texture, where the shape is the
            label); None where no cue speaks against the label.
        attributes: Per attribute its value in each picture: "shape", "texture", "colour", "x", ...
    """

    pixels: "Tensor"
    labels: "Tensor"
    classes: tuple[str, ...]
    masks: "Tensor | None"
    rivals: "Tensor | None"
    attributes: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def inputs(self) -> dict[str, "Tensor"]:
        """What `model.run` takes."""
        return {"pixel_values": self.pixels}


def a_thing(rng: Random, shape: str, texture: str, colour: str) -> Thing:
    """A thing of these attributes at a random place, of random size, turned by up to 15 degrees."""
    radius = rng.uniform(0.25, 0.36)
    room = (radius, 1 - radius)
    return Thing(
        shape, texture, colour, rng.uniform(*room), rng.uniform(*room), radius,
        rng.uniform(-math.pi / 12, math.pi / 12), (rng.random(), rng.random()),
    )  # fmt: skip


def a_scene(rng: Random, shape: str, texture: str, colour: str) -> Scene:
    """A picture of `a_thing`, on a ground of random grey."""
    thing = a_thing(rng, shape, texture, colour)
    return Scene(thing, rng.uniform(*GROUND), rng.getrandbits(32))


def draw(
    *things: Thing, side: int = SIDE, light: float = 0.5, grain: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One picture; later things lie over earlier ones.

    Args:
        things: What is on it.
        side: Its height and width in pixels.
        light: The ground's grey.
        grain: Seed of the noise; None: none.

    Returns:
        Pixels `[3, side, side]`, float32 from 0 to 1, and masks `[things, side, side]`, bool: where
        each thing covers more than half of a pixel, whether or not another lies over it.

    Cost: 0.1 ms a thing.
    """
    pixels = np.full((3, side, side), light)
    masks = np.zeros((len(things), side, side), dtype=bool)
    rows, columns = np.mgrid[:side, :side] + 0.5
    for thing, mask in zip(things, masks, strict=True):
        x, y = columns / side - thing.x, rows / side - thing.y
        cos, sin = math.cos(thing.turn) / thing.radius, math.sin(thing.turn) / thing.radius
        away = _OUTLINES[thing.shape](cos * x + sin * y, cos * y - sin * x)
        cover = np.clip(0.5 - away * thing.radius * side, 0, 1)
        u, v = columns / _PERIOD + thing.phase[0], rows / _PERIOD + thing.phase[1]
        weave = _CONTRAST * _WEAVES[thing.texture](u, v)
        fill = np.array(COLOURS[thing.colour])[:, None, None] + weave
        pixels = pixels * (1 - cover) + fill * cover
        mask[:] = cover > 0.5
    if grain is not None:
        # The legacy generator's stream is frozen: the same noise under every version of numpy.
        pixels = pixels + _GRAIN * np.random.RandomState(grain).standard_normal(pixels.shape)
    return pixels.clip(0, 1).astype(np.float32), masks
