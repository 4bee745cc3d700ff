"""Decoded depth picture -> metric depth at the source's resolution."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def log_dequantize(
    decoded: torch.Tensor,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    scale: float,
    shift: float,
    clamp_first: bool = True,
    depth_range: tuple[float, float] = (0.0, inf),
    with_prediction: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Decoded (B, C, H, W), any strides -> depth (B, h, w) float32, valid (B, h, w) bool, prediction or None.

    p = clamp to [-1, 1] and channel mean (clamp_first: FE2E's order, else FiffDepth's), / 2 + 1/2; the box (left,
    top, width, height) of it is resized to size (w, h), plain bilinear; depth = exp(scale * p + shift), clipped to
    `depth_range` (metres). Depth that is not finite and positive, a NaN prediction's among it, is NaN and not valid.
    prediction: the resized p (B, h, w) float32, when `with_prediction`.
    """
    if decoded.is_cuda:
        from densegeo.kernels.log_dequantize.kernel import log_dequantize as run
    else:
        from densegeo.kernels.log_dequantize.reference import log_dequantize as run
    return run(decoded, box, size, scale, shift, clamp_first, depth_range, with_prediction)
