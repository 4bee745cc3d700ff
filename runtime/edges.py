"""Flying pixels: a network's depth runs smoothly across what is a step in the world, through air."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
_STEEP = 0.3  # cosine: where a surface that depth describes and the predicted normal disagree by more than 72 degrees
_STEP = 0.04  # of the prediction's range, over two pixels
_STEEPER = 6.0  # than the median pixel


def flying_pixels(prediction: Float, normals: Float | None = None, points: Float | None = None) -> NDArray[np.bool_]:
    """(H, W) bool: pixels between two surfaces.

    With normals and points (H, W, 3), both in the OpenCV frame: where the surface through a pixel's neighbours stands
    edge-on to where the normal says it faces. Without: where the prediction rises over two pixels by more than a share
    of its range, and much more than at most pixels.
    """
    if normals is not None and points is not None:
        return _against_normals(normals, points)
    finite = np.where(np.isfinite(prediction), prediction, np.float32(0))
    span = float(np.ptp(finite)) or 1.0
    rise = np.zeros(prediction.shape, dtype=np.float32)
    rise[:, 1:-1] = np.abs(finite[:, 2:] - finite[:, :-2])
    rise[1:-1] = np.maximum(rise[1:-1], np.abs(finite[2:] - finite[:-2]))
    return np.asarray(rise > max(_STEP * span, _STEEPER * float(np.median(rise))))


def _against_normals(normals: Float, points: Float) -> NDArray[np.bool_]:
    across, down = np.zeros_like(points), np.zeros_like(points)
    across[:, 1:-1], down[1:-1] = points[:, 2:] - points[:, :-2], points[2:] - points[:-2]
    with np.errstate(invalid="ignore"):
        facing = np.cross(down, across)  # towards the camera: x right, y down, z forward
        length = np.linalg.norm(facing, axis=-1)
        agreement = (facing * normals).sum(axis=-1) / np.maximum(length, 1e-12)
        return np.asarray((agreement < _STEEP) & (length > 0))
