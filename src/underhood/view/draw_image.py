"""An image with a grid of values over it; the original is always beside."""

import numpy as np

from underhood.view import png
from underhood.view.colour import indices, limits_of
from underhood.view.doc import Grid, Picture
from underhood.view.legend import legend
from underhood.view.markup import Html, join, tag
from underhood.view.rescale import rescaled


def picture(view: Picture) -> Html:
    """The image alone, and with its grid."""
    width, height = view.size
    alt = view.alt or view.title or "an image"
    plain = _plate(_original(view, alt), width, height, "the image")
    if view.grid is None or not view.grid.rows or not view.grid.cols:
        return tag("div", plain, cls="uh-images")
    grid = rescaled(view.grid)
    limits = limits_of(grid.values, grid.scale, grid.limit)
    cells = indices(np.array(grid.values, dtype=float), limits)
    rows, cols = cells.shape
    over = tag(
        "img",
        src=png.data_uri(cells, limits.scale),
        alt=f"{grid.title or 'values'} over the image, {rows} by {cols} cells",
        cls="uh-over",
        style=f"opacity:{view.alpha:g}",
    )
    both = _plate(join([_original(view, ""), over]), width, height, grid.title or "values over it")
    missing = any(v is None for row in grid.values for v in row)
    told = tag("span", f"opacity {view.alpha:.0%}; cells without a value show the image")
    return join(
        [
            tag("div", plain, both, cls="uh-images"),
            legend(limits, grid.unit, marked=_marked(grid), extra=[told] * missing),
        ]
    )


def _marked(grid: Grid) -> str:
    return f"{len(grid.marks)} outlined in the table" if grid.marks else ""


def _original(view: Picture, alt: str) -> Html:
    return tag("img", src=f"data:image/png;base64,{view.png}", alt=alt, cls="uh-photo")


def _plate(inner: Html, width: int, height: int, caption: str) -> Html:
    plate = tag("div", inner, cls="uh-plate", style=f"aspect-ratio:{width}/{height}")
    return tag("figure", plate, tag("figcaption", caption, cls="uh-note"))
