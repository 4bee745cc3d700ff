"""Depth -> points, and points with normals as one organised cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def unproject(
    depth: torch.Tensor, intrinsics: tuple[float, float, float, float], normals: torch.Tensor | None = None
) -> torch.Tensor:
    """Depth (H, W) float32 metres along the optical axis -> points (H, W, 3) float32, OpenCV camera frame.

    intrinsics: fx, fy, cx, cy in pixels, pixel centres at integers: x = (column - cx) / fx * depth. NaN stays NaN.
    normals: (H, W, 3) float32; given, the result is (H, W, 6), points then normals. Rows may be apart in both.
    """
    if depth.is_cuda:
        from densegeo.kernels.unproject.kernel import unproject as run
    else:
        from densegeo.kernels.unproject.reference import unproject as run
    return run(depth, intrinsics, normals)
