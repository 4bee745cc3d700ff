"""An exact room for tests: what a network would give without any error."""

from __future__ import annotations

import numpy as np

from densegeo.runtime.camera import Camera
from densegeo.runtime.geometry import Geometry
from densegeo.size import Size

WIDTH, HEIGHT = 128, 96
K = (110.0, 110.0, 63.5, 47.5)
CAMERA = Camera(*K)


def room(
    height: float = 1.4, tilt: float = 0.15, scale: float = 2.2, shift: float = -0.3, ahead: float = 6.0
) -> tuple[Geometry, np.ndarray]:
    """A level floor, a wall `ahead` and one at the left, seen by a camera that looks down by `tilt` radians; exact."""
    rays = CAMERA.rays(Size(WIDTH, HEIGHT)).astype(np.float64)
    down, forward = np.array([0, np.cos(tilt), np.sin(tilt)]), np.array([0, -np.sin(tilt), np.cos(tilt)])
    planes = [(down, height), (forward, ahead), (np.array([-1.0, 0, 0]), 1.8)]
    with np.errstate(divide="ignore"):
        depths = np.stack([np.where(rays @ n > 1e-6, d / (rays @ n), np.inf) for n, d in planes])
    nearest = depths.argmin(axis=0)
    depth = depths.min(axis=0)
    normals = -np.stack([n for n, _ in planes])[nearest]
    p = ((np.log(depth) - shift) / scale).astype(np.float32)
    geometry = Geometry(
        p, "log_affine", normals.astype(np.float32), np.ones(p.shape, bool), Size(WIDTH, HEIGHT), model="m"
    )
    return geometry, depth
