"""Distortion models of ROS and OpenCV, on normalised image coordinates x / z and y / z.

Formulas: OpenCV's camera calibration documentation (`calib3d`, `fisheye`), ROS' distortion_models.hpp for the names.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Lens = Literal["plumb_bob", "rational_polynomial", "equidistant"]
LENSES: dict[Lens, tuple[int, ...]] = {  # how many coefficients each may have
    "plumb_bob": (0, 4, 5),
    "rational_polynomial": (0, 8),
    "equidistant": (0, 4),
}
_ANGLES = np.linspace(0.0, 0.5 * np.pi - 1e-3, 8192)  # from the axis, radians: a table of the lens' radii
_STEPS = 4  # of Newton's method, for the tangential part
_CLOSE = 1e-5  # in normalised coordinates, a hundredth of a pixel: what no ray comes closer to is outside the model


def distort(x: Float64, y: Float64, lens: Lens, coefficients: tuple[float, ...]) -> tuple[Float64, Float64]:
    """Where the lens images the ray (x, y, 1), in normalised coordinates."""
    if lens == "equidistant":
        radius = np.hypot(x, y)
        angle = np.arctan(radius)
        ratio = np.where(radius > 1e-12, _fisheye(angle, coefficients) / np.maximum(radius, 1e-12), 1.0)
        return x * ratio, y * ratio
    k1, k2, p1, p2, k3, k4, k5, k6 = (*coefficients, *[0.0] * (8 - len(coefficients)))
    r2 = x * x + y * y
    radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
    xy = x * y
    return (
        x * radial + 2 * p1 * xy + p2 * (r2 + 2 * x * x),
        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * xy,
    )


def undistort(x: Float64, y: Float64, lens: Lens, coefficients: tuple[float, ...]) -> tuple[Float64, Float64]:
    """The ray (x, y, 1) that the lens images at normalised (x, y); NaN where there is none in front of the camera.

    Of several rays the one nearest to the axis: radii are looked up in a table that ends where the lens folds back.
    """
    if lens != "equidistant" and not any(coefficients):
        return x, y
    table = _ANGLES if lens == "equidistant" else np.tan(_ANGLES)
    if lens == "equidistant":
        imaged = _fisheye(table, coefficients)
    else:
        imaged, _ = distort(table, np.zeros_like(table), lens, _radial_only(coefficients))
    folds = np.flatnonzero(~(np.diff(imaged) > 0))
    end = folds[0] + 1 if len(folds) else len(table)
    radius = np.hypot(x, y)
    tangent = np.tan(np.interp(radius, imaged[:end], _ANGLES[:end], right=np.nan))
    ratio = np.where(radius > 1e-12, tangent / np.maximum(radius, 1e-12), 1.0)
    u, v = x * ratio, y * ratio
    if lens == "equidistant" or _radial_only(coefficients) == coefficients:
        return u, v
    with np.errstate(all="ignore"):
        for _ in range(_STEPS):
            du, dv = _newton(u, v, x, y, lens, coefficients)
            u, v = u + du, v + dv
        back_x, back_y = distort(u, v, lens, coefficients)
        converged = (np.hypot(back_x - x, back_y - y) < _CLOSE) & (np.hypot(u, v) < np.tan(_ANGLES[end - 1]))
    return np.where(converged, u, np.nan), np.where(converged, v, np.nan)


def _radial_only(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """Without p1 and p2."""
    return (*coefficients[:2], 0.0, 0.0, *coefficients[4:])


def _newton(
    u: Float64, v: Float64, x: Float64, y: Float64, lens: Lens, coefficients: tuple[float, ...]
) -> tuple[Float64, Float64]:
    """The step towards the ray that is imaged at (x, y), by forward differences of `distort`."""
    h = 1e-7
    now_x, now_y = distort(u, v, lens, coefficients)
    right, below = distort(u + h, v, lens, coefficients), distort(u, v + h, lens, coefficients)
    xu, yu, xv, yv = (right[0] - now_x) / h, (right[1] - now_y) / h, (below[0] - now_x) / h, (below[1] - now_y) / h
    gap_x, gap_y = x - now_x, y - now_y
    determinant = xu * yv - xv * yu
    return (yv * gap_x - xv * gap_y) / determinant, (xu * gap_y - yu * gap_x) / determinant


def _fisheye(angle: Float64, coefficients: tuple[float, ...]) -> Float64:
    k1, k2, k3, k4 = coefficients or (0.0, 0.0, 0.0, 0.0)
    a2 = angle * angle
    return angle * (1 + a2 * (k1 + a2 * (k2 + a2 * (k3 + a2 * k4))))
