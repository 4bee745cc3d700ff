"""Decoded normal picture -> unit normals at the source's resolution, in a chosen frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch

Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

NETWORK_TO_OPENCV: Matrix = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))  # (left, up, back) -> (right, down, forward)


def normals(
    decoded: torch.Tensor,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    matrix: Matrix = NETWORK_TO_OPENCV,
) -> torch.Tensor:
    """Decoded (B, 3, H, W), any strides -> normals (B, h, w, 3) float32.

    Clamped to [-1, 1]; the box (left, top, width, height) is resized to size (w, h), plain bilinear; then unit length
    (divided by at least 1e-9, so zero stays zero; NaN in one component makes all three NaN); then matrix @ normal.
    """
    return implementation(__name__, decoded).normals(decoded, box, size, matrix)
