"""Colours and pictures: one map for cells and pixels, fair limits."""

import io
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from underhood.view.colour import (
    MISSING,
    Scale,
    cell_colour,
    hex_of,
    indices,
    ink,
    limits_of,
    palette,
)
from underhood.view.png import encode

SCALES: tuple[Scale, ...] = get_args(Scale)


def test_ends_and_middle_of_the_signed_map() -> None:
    limits = limits_of([-2.0, 1.0], "diverging")
    assert (limits.low, limits.high, limits.clipped) == (-2.0, 2.0, 0)
    assert cell_colour(2.0, limits) == "#2166ac"
    assert cell_colour(-2.0, limits) == "#b2182b"
    assert cell_colour(0.0, limits) == "#ffffff"
    assert cell_colour(99.0, limits) == "#2166ac"


def test_limits_are_robust_and_say_so() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, 1000)
    values[0] = 500
    limits = limits_of(values, "sequential")
    assert limits.high < 1.01
    assert limits.clipped >= 1
    assert limits.extreme == 500
    assert limits_of(values[:100], "diverging").high == 500, "few values never clip"
    assert limits_of(values, "probability").high == 1
    sparse = np.zeros(1000)
    sparse[3] = -4
    assert limits_of(sparse, "diverging").high == 4, "a lone value is not drawn as infinite"
    assert limits_of([None, float("nan")], "diverging").high == 1


@pytest.mark.parametrize("scale", SCALES)
def test_pixels_equal_cell_colours(scale: Scale) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.4, 1, (7, 11))
    values[2, 3] = values[6, 10] = np.nan
    limits = limits_of(values, scale)
    cells = indices(values, limits)
    picture = np.array(Image.open(io.BytesIO(encode(cells, scale))).convert("RGBA"))
    assert picture.shape == (7, 11, 4)
    for (r, c), value in np.ndenumerate(values):
        if np.isnan(value):
            assert picture[r, c, 3] == 0
            assert cells[r, c] == MISSING
        else:
            assert "#" + bytes(picture[r, c, :3]).hex() == cell_colour(float(value), limits)
            assert picture[r, c, 3] == 255


@pytest.mark.parametrize("top", [1.7e308, 1.0, 1e-300, 5e-324])
def test_ends_and_middle_of_the_smallest_and_largest_numbers(top: float) -> None:
    values = [-top, 0.0, top, 1.7e308]
    limits = limits_of(values[:3], "diverging")
    assert indices(values, limits).tolist() == [0, 127, 254, 254]


def test_zoom_repeats_pixels() -> None:
    cells = np.array([[0, 254]], dtype=np.uint8)
    picture = Image.open(io.BytesIO(encode(cells, "diverging", zoom=3)))
    assert picture.size == (6, 3)


@pytest.mark.parametrize("scale", SCALES)
def test_ink_is_legible_on_every_colour(scale: Scale) -> None:
    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for index in range(len(palette(scale))):
        back = hex_of(index, scale)
        pair = sorted((luminance(back), luminance(ink(back))))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.2, back
