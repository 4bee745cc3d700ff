"""Camera frame -> the network's input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.colors import Color, color_row
from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def preprocess(
    frame: torch.Tensor,
    size: tuple[int, int],
    *,
    box: tuple[int, int, int, int] | None = None,
    color: Color = "rgb",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Frame (H, W, 3) uint8, or YCbCr as `color` says, rows and pixels may be apart -> rgb (1, 3, h, w) in [-1, 1] for
    size (w, h).

    Antialiased bilinear (triangle filter, support grows when shrinking; torch's `interpolate(antialias=True)` on
    floats) into the box (left, top, width, height) of the result, by default all of it; outside, edge pixels repeat.
    YCbCr becomes RGB, clipped and not rounded, before it is resized. dtype: of the result, default float32.
    """
    import torch

    return implementation(__name__, frame).preprocess(
        frame, size, box or (0, 0, *size), color_row(color), dtype or torch.float32
    )
