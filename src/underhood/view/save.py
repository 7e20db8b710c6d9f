"""A view into a file of the reader's choice, or onto the screen."""

import base64
import sys
from os import PathLike
from pathlib import Path

import numpy as np

from underhood.core.errors import UsageError, nearest
from underhood.view import files
from underhood.view.doc import Diff, Grid, Picture, View

SUFFIXES = (".html", ".json", ".csv", ".txt", ".png")

_PNG_SIDE = 800  # pixels that the longer side of a saved picture reaches, in whole cells


def save(view: View, path: str | PathLike[str]) -> None:
    """Write the view as the suffix says; see `View.save`."""
    target = Path(path)
    files.write(target, encode(view, target.suffix.lower()))


def encode(view: View, suffix: str) -> bytes:
    """The bytes of the view in the format of this suffix.

    Raises:
        UsageError: another suffix, or `.png` for a kind that is no picture.
    """
    match suffix:
        case ".json":
            return (view.to_json(indent=1) + "\n").encode()
        case ".html":
            from underhood.view.page import Section, page

            inner = view.model_copy(update={"title": ""})
            section = Section(id="view", title=view.title or view.kind, views=[inner])
            text = page(view.title or view.kind, [section], provenance=view.provenance)
            return text.encode()
        case ".csv":
            from underhood.view.flat import to_csv

            return to_csv(view).encode()
        case ".txt":
            from underhood.view.text import to_plain

            return to_plain(view).encode()
        case ".png":
            return _png(view)
    raise UsageError(
        "no format has this suffix",
        given=suffix or "a name without suffix",
        why=f"a view is saved as {', '.join(SUFFIXES)}",
        do=f"nearest: {nearest(suffix, SUFFIXES)}",
    )


def _png(view: View) -> bytes:
    """A grid one pixel per cell, enlarged; A - B of a difference; the image of a picture."""
    if isinstance(view, Picture):
        return base64.b64decode(view.png)
    grid = view.delta if isinstance(view, Diff) else view
    if not isinstance(grid, Grid) or not grid.rows or not grid.cols:
        raise UsageError(
            "only a grid with cells, a difference of two, or an image can be saved as a picture",
            given=f"a view of kind {view.kind}",
            do="save it as .html, and print that",
        )
    from underhood.view import png
    from underhood.view.colour import indices, limits_of

    limits = limits_of(grid.values, grid.scale, grid.limit)
    cells = indices(np.array(grid.values, dtype=float), limits)
    zoom = max(1, _PNG_SIDE // max(cells.shape))
    return png.encode(cells, grid.scale, zoom=zoom)


def show(view: View) -> None:
    """Display the view: as HTML in a notebook, as text in a terminal."""
    # IPython is never imported here: if it runs this code, it is loaded already.
    shell = sys.modules.get("IPython")
    if shell is not None and shell.get_ipython() is not None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        display(view)
        return
    from rich.console import Console

    Console().print(view.text())
