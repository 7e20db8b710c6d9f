"""A PNG writer for matrices: 8-bit palette, one pixel per cell, nothing but `zlib` and `struct`.

The browser enlarges the picture with `image-rendering: pixelated`, so a 48 x 512 grid costs some
twenty kilobytes where a table would cost a megabyte and half a second of layout. The palette is
that of `colour`; index `MISSING` is transparent, so hatching behind the picture shows through.
"""

import base64
import struct
import zlib

import numpy as np

from underhood.view.colour import MISSING, Scale, palette


def encode(cells: np.ndarray, scale: Scale, *, zoom: int = 1) -> bytes:
    """The PNG file of a matrix of palette indices.

    Args:
        cells: uint8 `[rows, cols]`, as `colour.indices` returns.
        scale: the colour map the indices belong to.
        zoom: pixels per cell and side; 1 for a page, more for a file to be looked at by itself.
    """
    cells = np.asarray(cells, dtype=np.uint8)
    if zoom > 1:
        cells = cells.repeat(zoom, axis=0).repeat(zoom, axis=1)
    rows, cols = cells.shape
    colours = palette(scale).tobytes() + b"\xff\xff\xff"  # the last entry is MISSING
    opacity = b"\xff" * MISSING + b"\x00"
    return _file(rows, cols, 3, cells, _chunk(b"PLTE", colours) + _chunk(b"tRNS", opacity))


def encode_rgb(pixels: np.ndarray) -> bytes:
    """The PNG file of an image: uint8 `[height, width, 3]`."""
    height, width = pixels.shape[:2]
    return _file(height, width, 2, pixels.reshape(height, width * 3))


def _file(rows: int, cols: int, colour: int, lines: np.ndarray, before: bytes = b"") -> bytes:
    # Each scan line starts with its filter type; 0 is "none", best for palette pictures.
    filtered = np.zeros((rows, lines.shape[1] + 1), dtype=np.uint8)
    filtered[:, 1:] = lines
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", cols, rows, 8, colour, 0, 0, 0)),
            before,
            _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def data_uri(cells: np.ndarray, scale: Scale) -> str:
    """The same picture as a `data:` address for an `<img>`."""
    return "data:image/png;base64," + base64.b64encode(encode(cells, scale)).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
