"""Bayer patterns -> RGB, bilinear: a missing colour is the mean of the nearest pixels that have it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def demosaic(mosaic: NDArray[Any], pattern: str) -> NDArray[Any]:
    """(h, w) of one colour a pixel -> RGB (h, w, 3) of the same kind of integers.

    pattern: the colours of the first 2x2 pixels, row by row: "rggb", "bggr", "gbrg" or "grbg". Beyond the edges the
    picture is mirrored, which keeps the pattern.
    """
    height, width = mosaic.shape
    padded = np.pad(mosaic, 1, mode="reflect" if min(height, width) > 1 else "edge").astype(np.uint32)
    centre = padded[1:-1, 1:-1]
    beside = padded[1:-1, :-2] + padded[1:-1, 2:]
    above = padded[:-2, 1:-1] + padded[2:, 1:-1]
    corners = padded[:-2, :-2] + padded[:-2, 2:] + padded[2:, :-2] + padded[2:, 2:]
    rgb = np.empty((height, width, 3), mosaic.dtype.newbyteorder("="))
    for place, color in enumerate(pattern):
        cell = np.s_[place // 2 :: 2, place % 2 :: 2]
        if color == "g":
            row_color = pattern[place ^ 1]  # the green pixel's neighbours along its row
            row, column = (0, 2) if row_color == "r" else (2, 0)
            rgb[cell][..., 1] = centre[cell]
            rgb[cell][..., row] = (beside[cell] + 1) // 2
            rgb[cell][..., column] = (above[cell] + 1) // 2
        else:
            this_color, opposite_color = (0, 2) if color == "r" else (2, 0)
            rgb[cell][..., this_color] = centre[cell]
            rgb[cell][..., 1] = (beside[cell] + above[cell] + 2) // 4
            rgb[cell][..., opposite_color] = (corners[cell] + 2) // 4
    return rgb
