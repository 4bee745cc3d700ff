"""From a network's own depth space to metres: two numbers per image, given or fitted to measured anchors.

Every kind is a straight line in some space of depth: log_affine ln(depth) = scale * p + shift, affine
depth = scale * p + shift, disparity_affine 1/depth = scale * p + shift. `SPACES` holds that space's functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densegeo.errors import CalibrationError
from densegeo.outputs import DepthKind

Float64 = NDArray[np.float64]

MIN_ANCHORS = 3  # a line through two says nothing about how well it fits
MIN_INLIERS = 0.5  # share of the anchors
MIN_SPREAD = 0.02  # range of the anchors' predictions, as a share of the image's (2nd to 98th percentile)
INLIER_RATIO = 1.25  # an inlier's fitted depth is within this factor of its measured one
_PAIRS = 500  # lines tried
_SCORED = 2000  # anchors that score a line
_REFITS = 5


@dataclass(frozen=True)
class Space:
    """The space in which a depth kind is a straight line, with the depth units of its two parameters."""

    to: Callable[[Any], Any]  # metres -> the space
    back: Callable[[Any], Any]  # the space -> metres
    text: str


SPACES: dict[DepthKind, Space] = {
    "log_affine": Space(np.log, np.exp, "ln(depth) = scale * prediction + shift"),
    "affine": Space(lambda x: x, lambda x: x, "depth = scale * prediction + shift"),
    "disparity_affine": Space(np.reciprocal, np.reciprocal, "1/depth = scale * prediction + shift"),
}


@dataclass(frozen=True)
class Calibration:
    """How a result became metric.

    kind: the depth kind before. scale, shift: the line in that kind's space (metres).
    residual: RMS over the inliers in that space, NaN when nothing was fitted. inliers, count: anchors kept, given.
    """

    kind: DepthKind
    scale: float
    shift: float
    residual: float = float("nan")
    inliers: int = 0
    count: int = 0


def metric_depth(prediction: NDArray[np.float32], calibration: Calibration) -> NDArray[np.float32]:
    """(H, W) prediction -> (H, W) float32 metres; NaN where the line gives no positive, finite depth."""
    with np.errstate(all="ignore"):
        line = np.float32(calibration.scale) * prediction + np.float32(calibration.shift)
        depth = np.asarray(SPACES[calibration.kind].back(line), dtype=np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def from_parameters(kind: DepthKind, scale: float, shift: float) -> Calibration:
    """Given numbers. Raises CalibrationError unless both are finite and scale is positive."""
    scale, shift = number("scale", scale), number("shift", shift)
    if not (np.isfinite(scale) and np.isfinite(shift)):
        raise CalibrationError(f"scale and shift must be finite, not {scale} and {shift}.")
    if scale <= 0:
        raise CalibrationError(f"scale must be positive in {SPACES[kind].text}, not {scale:g}.")
    return Calibration(kind, scale, shift)


def number(name: str, value: object) -> float:
    """A float whose magnitude float32 holds, or an infinity or NaN. Raises CalibrationError for anything else."""
    try:
        if isinstance(value, (str, bytes)):
            raise ValueError
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise CalibrationError(f"{name} must be a number, not {value!r}.") from None
    if math.isfinite(found) and abs(found) > float(np.finfo(np.float32).max):
        raise CalibrationError(f"{name} must be within float32's range, not {value!r}.")
    return found


def from_range(kind: DepthKind, values: NDArray[Any], near: float, far: float) -> Calibration:
    """The line that puts the nearest and the farthest of the valid predictions (N,) at near and far metres.

    The extremes rather than percentiles: so every depth lies in [near, far], and none becomes invalid.
    Raises CalibrationError unless 0 < near < far and the prediction is not flat.
    """
    near, far = number("near", near), number("far", far)
    if not (np.isfinite(near) and np.isfinite(far) and 0 < near < far):
        raise CalibrationError(f"near and far must be finite metres with 0 < near < far, not {near} and {far}.")
    _percentiles(values)
    low, high = float(values.min()), float(values.max())
    ends = sorted((float(SPACES[kind].to(float(near))), float(SPACES[kind].to(float(far)))))
    scale = (ends[1] - ends[0]) / (high - low)
    return Calibration(kind, scale, ends[0] - scale * low)


def from_anchors(
    kind: DepthKind, prediction: NDArray[np.float32], valid: NDArray[np.bool_], uv: ArrayLike, metres: ArrayLike
) -> Calibration:
    """Robust least squares, in the kind's own space, of measured depths on the prediction (H, W).

    uv: (N, 2) pixel coordinates (column, row), pixel centres at integers, sampled bilinearly; metres: (N,) z-depths.
    Starts from the line of least median residual, drops outliers by their median absolute deviation (and those
    more than a factor of 1.25 off), refits. Deterministic. Anchors on invalid pixels count as outliers.
    Raises CalibrationError for anchors that do not determine a positive scale.
    """
    points, depths = _checked_anchors(prediction.shape[1], prediction.shape[0], uv, metres)
    count = len(depths)
    sampled = _sample(np.where(valid, prediction, np.float32(np.nan)), points)
    usable = np.isfinite(sampled)
    x, z = sampled[usable], depths[usable]
    if len(x) < MIN_ANCHORS:
        raise CalibrationError(f"Only {len(x)} of {count} anchors lie on valid pixels; at least {MIN_ANCHORS} must.")
    low, high = _percentiles(prediction[valid])
    _check_spread(x, high - low)
    y = np.asarray(SPACES[kind].to(z), dtype=np.float64)
    scale, shift, median = _least_median_line(x, y)
    inliers = np.zeros(len(x), dtype=bool)
    for _ in range(_REFITS):
        residual = np.abs(scale * x + shift - y)
        # 1.4826 turns a median absolute deviation into a standard deviation; the floor keeps exact data whole
        sigma = 1.4826 * (1 + 5 / max(len(x) - 2, 1)) * median
        kept = (residual <= max(2.5 * sigma, 1e-6 + 1e-3 * float(np.ptp(y)))) & _close(kind, scale * x + shift, z)
        if kept.sum() < max(MIN_ANCHORS, MIN_INLIERS * count):
            raise CalibrationError(
                f"Only {int(kept.sum())} of {count} anchors agree with the prediction (within a factor of "
                f"{INLIER_RATIO}). Check that uv is (column, row) in the source image and metres are z-depths."
            )
        _check_spread(x[kept], high - low)
        if np.array_equal(kept, inliers):
            break
        inliers = kept
        scale, shift = _line(x[kept], y[kept])
        median = float(np.median(np.abs(scale * x[kept] + shift - y[kept])))
    if scale <= 0:
        raise CalibrationError(
            f"The anchors give a negative scale ({scale:.4g}) in {SPACES[kind].text}: their depths run against the "
            "prediction. Check that uv is (column, row) and metres are depths, not disparities."
        )
    rms = float(np.sqrt(np.mean((scale * x[inliers] + shift - y[inliers]) ** 2)))
    return Calibration(kind, scale, shift, rms, int(inliers.sum()), count)


def _checked_anchors(width: int, height: int, uv: ArrayLike, metres: ArrayLike) -> tuple[Float64, Float64]:
    try:
        points, depths = np.asarray(uv, dtype=np.float64), np.asarray(metres, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"Anchors must be numbers: uv (N, 2) and metres (N,). {error}") from error
    if points.ndim != 2 or points.shape[1] != 2 or depths.shape != points.shape[:1]:
        raise CalibrationError(f"Anchors must be uv (N, 2) and metres (N,), not {points.shape} and {depths.shape}.")
    if len(depths) < MIN_ANCHORS:
        raise CalibrationError(f"{len(depths)} anchors are too few: at least {MIN_ANCHORS} are needed to see an error.")
    if not (np.isfinite(points).all() and np.isfinite(depths).all()):
        raise CalibrationError("Anchors must be finite; remove those with NaN or infinite uv or metres.")
    if (depths <= 0).any():
        raise CalibrationError("Anchor depths must be positive metres; remove zeros (no return) and negative values.")
    outside = (points < -0.5).any(axis=1) | (points[:, 0] > width - 0.5) | (points[:, 1] > height - 0.5)
    if outside.any():
        u, v = points[outside][0]
        raise CalibrationError(
            f"{int(outside.sum())} anchors lie outside the {width}x{height} image, the first at ({u:g}, {v:g}). "
            "uv is (column, row) in pixels of the source image."
        )
    return points, depths


def _sample(plane: NDArray[np.float32], points: Float64) -> Float64:
    """Bilinear samples (N,) of (H, W) at (column, row), clamped at the border; NaN next to a NaN with weight."""
    height, width = plane.shape
    u, v = np.clip(points[:, 0], 0, width - 1), np.clip(points[:, 1], 0, height - 1)
    left, top = np.floor(u).astype(np.intp), np.floor(v).astype(np.intp)
    total = np.zeros(len(points))
    for row, row_weight in ((top, 1 - (v - top)), (np.minimum(top + 1, height - 1), v - top)):
        for column, column_weight in ((left, 1 - (u - left)), (np.minimum(left + 1, width - 1), u - left)):
            weight = row_weight * column_weight
            total += np.where(weight > 0, weight * plane[row, column], 0.0)
    return total


def _percentiles(values: NDArray[Any]) -> tuple[float, float]:
    if values.size == 0:
        raise CalibrationError("The prediction has no valid pixels, so it cannot be calibrated.")
    low, high = (float(p) for p in np.percentile(values.astype(np.float64), (2, 98)))
    if high - low <= 1e-6 * max(1.0, abs(high)):
        raise CalibrationError("The prediction is flat (one depth everywhere), so no scale can be determined.")
    return low, high


def _check_spread(x: Float64, span: float) -> None:
    if float(np.ptp(x)) < MIN_SPREAD * span:
        raise CalibrationError(
            f"The anchors are degenerate: their predictions span {float(np.ptp(x)) / span:.1%} of the image's range, "
            f"and at least {MIN_SPREAD:.0%} is needed. Add anchors at clearly different depths."
        )


def _close(kind: DepthKind, line: Float64, metres: Float64) -> NDArray[np.bool_]:
    with np.errstate(all="ignore"):
        ratio = np.asarray(SPACES[kind].back(line)) / metres
    return np.asarray((ratio > 1 / INLIER_RATIO) & (ratio < INLIER_RATIO))


def _least_median_line(x: Float64, y: Float64) -> tuple[float, float, float]:
    """(scale, shift, that quantile of |residual|) of the best line through two anchors (least median of squares)."""
    random = np.random.default_rng(0)
    scored = np.arange(len(x)) if len(x) <= _SCORED else random.choice(len(x), _SCORED, replace=False)
    xs, ys = x[scored], y[scored]
    if len(xs) * (len(xs) - 1) // 2 <= _PAIRS:
        pairs = np.array(list(combinations(range(len(xs)), 2)))
    else:
        pairs = random.integers(0, len(xs), (_PAIRS, 2))
    step = xs[pairs[:, 1]] - xs[pairs[:, 0]]
    usable = np.abs(step) > 1e-3 * np.ptp(xs)
    pairs, step = pairs[usable], step[usable]
    if len(pairs) == 0:
        raise CalibrationError("The anchors are degenerate: nearly all have one prediction. Add others.")
    scales = (ys[pairs[:, 1]] - ys[pairs[:, 0]]) / step
    shifts = ys[pairs[:, 0]] - scales * xs[pairs[:, 0]]
    residuals = np.abs(scales[:, None] * xs + shifts[:, None] - ys)
    quantile = (len(xs) + 3) // 2 - 1  # the median, corrected for the two points every line passes through
    scores = np.partition(residuals, min(quantile, len(xs) - 1), axis=1)[:, min(quantile, len(xs) - 1)]
    best = int(np.argmin(scores))
    return float(scales[best]), float(shifts[best]), float(scores[best])


def _line(x: Float64, y: Float64) -> tuple[float, float]:
    """Least-squares (scale, shift) of y = scale * x + shift."""
    dx = x - x.mean()
    scale = float((dx * (y - y.mean())).sum() / (dx * dx).sum())
    return scale, float(y.mean() - scale * x.mean())
