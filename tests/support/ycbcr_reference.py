"""Bytes of YCbCr cameras, and what they mean in float64, written from the standards' forward equations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from densegeo.colors import COLORS

YCBCR = [name for name, row in COLORS.items() if row.ycbcr is not None]


def camera_bytes(color: str, width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """Any bytes, colours outside RGB's cube among them."""
    shape = (height * 3 // 2, width) if color.startswith("nv12") else (height, width, 2)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rgb64(color: str, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(h, w, 3) in [0, 255]: the forward matrix of BT.601 (section 2.5) or BT.709 (section 3), inverted by numpy."""
    red, blue = (0.2126, 0.0722) if "bt709" in color else (0.299, 0.114)
    luma = np.array([red, 1 - red - blue, blue])
    forward = np.stack([luma, ([0, 0, 1] - luma) / (2 * (1 - blue)), ([1, 0, 0] - luma) / (2 * (1 - red))])
    y, cb, cr = planes(color, pixels)
    if "full" in color:
        levels = np.stack([y / 255, (cb - 128) / 255, (cr - 128) / 255], axis=-1)
    else:
        levels = np.stack([(y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224], axis=-1)
    return np.clip(levels @ np.linalg.inv(forward).T, 0, 1) * 255


def planes(color: str, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], ...]:
    """Y, Cb, Cr of every pixel, one pixel after the other."""
    nv12, first = color.startswith("nv12"), 1 if color.startswith("uyvy") else 0
    height, width = (len(pixels) // 3 * 2, pixels.shape[1]) if nv12 else pixels.shape[:2]
    out = np.empty((3, height, width))
    flat = pixels.ravel()
    for row in range(height):
        for column in range(width):
            even = column // 2 * 2
            if nv12:
                chroma = (height + row // 2) * width + even
                out[:, row, column] = flat[row * width + column], flat[chroma], flat[chroma + 1]
            else:
                pair = 2 * (row * width + even)
                cb = pair + 1 - first
                out[:, row, column] = flat[pair + 2 * (column - even) + first], flat[cb], flat[cb + 2]
    return out[0], out[1], out[2]
