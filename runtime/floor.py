"""A known height of the camera over the floor: the floor is found by its normals, and gives metres there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import number_of, shown
from densegeo.errors import CalibrationError, MissingOutputError
from densegeo.runtime.anchors import LOCAL_ERROR, SHARED
from densegeo.runtime.camera import Camera
from densegeo.runtime.evidence import Evidence
from densegeo.runtime.metric import doubt_metres

if TYPE_CHECKING:
    from densegeo.runtime.geometry import Geometry

_LEVEL = (0.0, -1.0, 0.0)  # up in the OpenCV frame of a camera that is held level
_TILTED = 35.0  # degrees that a camera without an IMU may be off level
_FLAT = 20.0  # degrees that a floor's normals may be off the vertical
_SHARE = 0.02  # of the image that a floor must fill
_SAMPLES = 20000
_BIN = 0.05  # of ln(height)
_BANDS = 6  # of the floor, near to far: each says what the whole would, with its own error
_KNOWN = 0.03  # relative error of a camera's height
_SHALLOW = 0.12  # metres under the camera, of a point one metre ahead: farther floor hangs on the last degree of up
_TILT = (0.02, 0.06)  # error of up in radians, when given and when taken from the floor's normals


def floor_evidence(geometry: Geometry, camera: Camera, other_evidence: Evidence, height: float, up: Any) -> Evidence:
    """height: metres of the camera over the floor. up: (3,) against gravity in the camera's OpenCV frame; None:
    level within 35 degrees, made exact by the floor's own normals.

    Raises CalibrationError for impossible numbers and where there is no floor, MissingOutputError without normals.
    """
    if geometry.normals is None:
        raise MissingOutputError("camera_height needs normals, to find the floor, and this model has none.")
    if geometry.depth_kind != "log_affine" and (
        geometry.calibration is None or geometry.calibration.kind != "log_affine"
    ):
        raise CalibrationError("camera_height needs log-affine depth. Give three anchors or more.")
    metres = number_of(height)
    if metres is None or not (math.isfinite(metres) and metres > 0):
        raise CalibrationError(f"camera_height must be metres above 0, not {shown(height)}.")
    doubt_metres("camera_height", metres, stacklevel=5)
    if not other_evidence.information[0, 0] > 0:
        raise CalibrationError("camera_height needs the scale, which normals do not tell here. Give anchors.")
    step = max(1, math.isqrt(geometry.valid.size // _SAMPLES))
    part = (slice(step // 2, None, step), slice(step // 2, None, step))
    p = geometry.require_prediction("depth")[part].astype(np.float64)
    normals = geometry.normals[part].astype(np.float64)
    rays = camera.rays(geometry.valid.shape[::-1])[part].astype(np.float64)
    usable = geometry.valid[part] & np.isfinite(rays[..., 0]) & np.isfinite(normals[..., 0])
    direction = _up(normals[usable], up)
    level = usable & (normals @ direction > math.cos(math.radians(_FLAT)))
    below = -(rays @ direction)  # metres under the camera for a depth of one
    level &= below > _SHALLOW
    scale, _ = other_evidence.line
    heights = scale * p[level] + np.log(below[level])  # ln(height) - t
    floor = _lowest(heights, int(usable.sum()))
    x, y = p[level][floor], math.log(metres) - np.log(below[level][floor])  # ln(depth) there
    edges = np.quantile(x, np.linspace(0, 1, _BANDS + 1))
    bands = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, _BANDS - 1)
    under = below[level][floor]
    middles = [[float(np.median(values[bands == band])) for values in (x, y, under)] for band in np.unique(bands)]
    a, values, under = np.array(middles).T
    tilt = _TILT[up is None] / under
    # the bands share the height's own error, and what is left of the network's in a median over a surface
    sigma = np.sqrt(len(middles) * (SHARED * LOCAL_ERROR**2 + _KNOWN**2 + tilt**2))
    return Evidence.of(a, 1.0, values, sigma, "the camera's height")


def checked_up(up: Any) -> NDArray[np.float64]:
    """(3,) float64. Raises CalibrationError for what is no direction."""
    try:
        direction = np.asarray(up, dtype=np.float64)
    except (TypeError, ValueError):
        direction = np.empty(0)
    if direction.shape != (3,) or not np.isfinite(direction).all() or not direction.any():
        raise CalibrationError("up must be three numbers: the direction against gravity in the camera's frame.")
    return direction


def _up(normals: Any, up: Any) -> Any:
    if up is not None:
        direction = checked_up(up)
        direction = direction / np.linalg.norm(direction)
        if direction[1] > 0.5:
            raise CalibrationError("up points down in the image: it is against gravity, with y downwards (0, -1, 0).")
        return direction
    direction = np.array(_LEVEL)
    for limit in (_TILTED, 20.0, 12.0):
        near = normals[normals @ direction > math.cos(math.radians(limit))]
        if len(near) < 50:
            raise CalibrationError(
                f"There is no floor: nothing within {_TILTED:g} degrees of level faces up. Give up, or anchors."
            )
        direction = np.median(near, axis=0)
        direction /= np.linalg.norm(direction)
    if direction[1] > -math.cos(math.radians(_TILTED)):
        raise CalibrationError("The camera is too far from level to find the floor: give up, from an IMU.")
    return direction


def _lowest(heights: Any, pixels: int) -> Any:
    """Which of these belong to the lowest level surface that is large enough."""
    refusal = CalibrationError("There is no floor: too few level surfaces below the camera. Give anchors.")
    if len(heights) < max(30, _SHARE * pixels):
        raise refusal
    counts, edges = np.histogram(heights, bins=np.arange(heights.min() - _BIN, heights.max() + 2 * _BIN, _BIN))
    smooth = np.convolve(counts, [1, 2, 3, 2, 1], "same")
    peaks = np.flatnonzero(
        (smooth >= 0.3 * smooth.max()) & (smooth >= np.roll(smooth, 1)) & (smooth >= np.roll(smooth, -1))
    )
    middle = edges[peaks[-1]] + _BIN / 2
    chosen = np.abs(heights - middle) < 0.15
    middle = float(np.median(heights[chosen]))
    chosen = np.abs(heights - middle) < 0.15
    if chosen.sum() < max(30, 0.5 * _SHARE * pixels):
        raise refusal
    return chosen
