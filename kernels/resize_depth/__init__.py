"""Decoded depth picture -> prediction, or depth in metres, at the source's resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.outputs import Clamp

if TYPE_CHECKING:
    import torch

__all__ = ["Metres", "resize_depth"]


def resize_depth(
    decoded: torch.Tensor,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    clamp: Clamp = "before_mean",
    metres: Metres | None = None,
) -> torch.Tensor:
    """Decoded (B, C, H, W), any strides -> prediction (B, h, w) float32, or with `metres` depth (B, h, w) float32.

    p = clamp to [-1, 1] and channel mean (clamp: FE2E's comes before the mean, FiffDepth's after), / 2 + 1/2; the box
    (left, top, width, height) of it is resized to size (w, h), plain bilinear, in the prediction's own space. In metres
    that is NaN where the line gives no finite and positive depth, a NaN prediction's among it, and else in the range.
    """
    return implementation(__name__, decoded).resize_depth(decoded, box, size, clamp, metres)
