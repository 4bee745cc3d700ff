"""Decoded normal picture -> unit normals at the source's resolution, in a chosen frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation
from densegeo.outputs import Matrix, into_opencv

if TYPE_CHECKING:
    import torch

FE2E = into_opencv("dsine")


def normals(
    decoded: torch.Tensor,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    matrix: Matrix = FE2E,
) -> torch.Tensor:
    """Decoded (B, 3, H, W), any strides -> normals (B, h, w, 3) float32.

    Clamped to [-1, 1]; the box (left, top, width, height) is resized to size (w, h), plain bilinear; then unit length
    (divided by at least 1e-9, so zero stays zero; NaN in one component makes all three NaN); then matrix @ normal.
    """
    return implementation(__name__, decoded).normals(decoded, box, size, matrix)
