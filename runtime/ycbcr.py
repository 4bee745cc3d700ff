"""YCbCr -> RGB on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from densegeo.colors import Ycbcr


def from_ycbcr(bytes_: NDArray[np.uint8], ycbcr: Ycbcr) -> NDArray[np.float32]:
    """uint8 in one of the layouts of `Ycbcr` -> RGB (h, w, 3) float32 in [0, 1], not rounded to 8 bits."""
    width, height = ycbcr.size(bytes_.shape)
    if ycbcr.layout == "nv12":
        luma, chroma = bytes_[:height], bytes_[height:].reshape(height // 2, width // 2, 2)
    else:
        luma = bytes_[..., ycbcr.luma]
        chroma = bytes_[..., 1 - ycbcr.luma].reshape(height, width // 2, 2)
    by = ycbcr.conversion
    u, v = ((chroma[..., channel].astype(np.float32) - 128) / 255 for channel in (0, 1))
    y = (luma.astype(np.float32) - np.float32(by.black)) * np.float32(by.gain / 255)
    rgb = np.empty((height, width, 3), np.float32)
    blocks = rgb.reshape(len(chroma), ycbcr.rows_shared, width // 2, 2, 3)
    shared = y.reshape(blocks.shape[:-1])
    for channel, tint in enumerate((by.red_v * v, by.green_u * u + by.green_v * v, by.blue_u * u)):
        np.add(shared, tint[:, None, :, None], out=blocks[..., channel])
    return np.clip(rgb, 0.0, 1.0, out=rgb)
