"""Measured depths at pixels -> what they say of the line, robustly, beside what is known already.

The robust fit minimises Huber's loss of a small fixed width: convex, so that it has one minimum, moves continuously
with its data, and is close to the least absolute deviations, which almost half of the anchors may miss.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import CalibrationError, CalibrationWarning
from densegeo.outputs import DepthKind
from densegeo.runtime.evidence import Evidence
from densegeo.runtime.metric import SPACES, doubt_metres, percentiles
from densegeo.size import Size

Float64 = NDArray[np.float64]
Method = Literal["robust", "least_squares"]
METHODS: tuple[Method, ...] = ("robust", "least_squares")
MIN_SPREAD = 0.02  # range of the anchors' predictions, as a share of the image's (2nd to 98th percentile)
INLIER_RATIO = 1.25  # an inlier's fitted depth is within this factor of its measured one
LOCAL_ERROR = 0.085  # a network's relative depth error at one place (fe2e-tiny's on held-out views, seed 7)
_HUBER = 0.002  # width of Huber's loss in relative depth
_EXACT = 0.01  # relative: misses that count as none
_CELLS = (6, 8)  # rows, columns: a network's errors in one cell go together,
SHARED = 0.6  # by this share of their variance (the same views)
_EFFICIENCY = np.pi / 2  # variance of the least absolute deviations over that of least squares, of three and more
_ITERATIONS = 100


@dataclass(frozen=True, eq=False)
class AnchorFit:
    """evidence: of the line, with what was known before. residual: RMS over all anchors in the kind's space; inliers:
    those within 3 robust standard deviations and `INLIER_RATIO`; count: those given.
    """

    evidence: Evidence
    residual: float
    inliers: int
    count: int


def fit_anchors(
    kind: DepthKind,
    prediction: NDArray[np.float32],
    valid: NDArray[np.bool_],
    anchors: object,
    method: Method,
    other_evidence: Evidence,
    reason: CalibrationError | None = None,
    source_size: Size | None = None,
) -> AnchorFit:
    """Fit the line of `kind` to anchors, a pair (uv, metres): uv (N, 2) pixel coordinates (column, row), pixel centres
    at integers, sampled bilinearly; metres (N,) z-depths. Anchors on invalid pixels count as misses.

    source_size: of the image whose pixels uv are, which the (H, W) prediction shows whole; None: the prediction's.
    other_evidence: what is known of the line without them; reason: why normals do not tell. Deterministic.
    Raises CalibrationError for anchors that cannot be, and for those that do not determine a positive scale; a
    CalibrationWarning where they and the prediction disagree.
    """
    if method not in METHODS:
        raise CalibrationError(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
    shown = Size(prediction.shape[1], prediction.shape[0])
    points, depths = _checked(source_size or shown, anchors)
    points, count = resized(points, source_size or shown, shown), len(depths)
    sampled = sample(np.where(valid, prediction, np.float32(np.nan)), points)
    usable = np.isfinite(sampled)
    least = (
        max(1, 2 - other_evidence.rank) if other_evidence.rank else 3
    )  # a line through two says nothing about how well it fits
    if usable.sum() < least:
        raise CalibrationError(
            f"There are too few anchors: {int(usable.sum())} of {count} lie on valid pixels away from depth edges; at "
            f"least {least} must"
            + ("." if reason or other_evidence.rank else ", or one with the camera's intrinsics.")
            + (f" {reason}" if reason else "")
        )
    x, z, points = sampled[usable], depths[usable], points[usable]
    if other_evidence.rank == 0:
        _check_spread(x, prediction[valid])
    doubt_metres("Half of the anchors are farther than this", float(np.median(z)), stacklevel=5)
    y = np.asarray(SPACES[kind].to(z), dtype=np.float64)
    unit = float(np.median(np.abs(SPACES[kind].slope(z))))
    share = _independent(points, prediction.shape)
    fitted = _fit(x, y, unit, share, other_evidence, robust=method == "robust")
    scale, shift = fitted.line
    residual = scale * x + shift - y
    with np.errstate(all="ignore"):
        ratio = np.asarray(SPACES[kind].back(scale * x + shift)) / z
    close = (ratio > 1 / INLIER_RATIO) & (ratio < INLIER_RATIO)
    spread = 1.4826 * float(np.median(np.abs(residual)))
    inliers = int((close & (np.abs(residual) < max(3 * spread, _EXACT * unit))).sum())
    if scale <= 0:
        raise CalibrationError(
            f"The anchors give a negative scale ({scale:.4g}) in {SPACES[kind].text}: their depths run against the "
            "prediction. Check that uv is (column, row) and metres are depths, not disparities."
        )
    if count >= 3 and close.sum() < 0.5 * count:
        warnings.warn(
            f"{count - int(close.sum())} of {count} anchors are more than a factor of {INLIER_RATIO} off the depth "
            "that fits them best. The prediction may be wrong; check that uv is (column, row) in the source image.",
            CalibrationWarning,
            stacklevel=5,
        )
    return AnchorFit(fitted, float(np.sqrt(np.mean(residual**2))), inliers, count)


def _fit(x: Float64, y: Float64, unit: float, share: float, other_evidence: Evidence, robust: bool) -> Evidence:
    """Iteratively reweighted least squares. unit: of the space for a relative depth of one; share: of the anchors that
    are independent of each other.
    """
    weight, source = np.ones(len(x)), f"{len(x)} anchors" if len(x) > 1 else "1 anchor"
    sigma, last = LOCAL_ERROR * unit, (np.inf, np.inf)
    few = min(1.0, 8.0 / len(x))  # how much of the noise's estimate is the usual one, and not these anchors' own
    evidence = other_evidence
    for _ in range(_ITERATIONS):
        variance = sigma**2 * (1 + (_EFFICIENCY - 1) * min(1.0, 0.5 * (len(x) - 1)) if robust else 1.0)
        rows = np.sqrt(variance / (share * weight / weight.mean()))
        evidence = other_evidence + Evidence.of(x, 1.0, y, rows, source)
        line = evidence.line
        residual = line[0] * x + line[1] - y
        if max(abs(line[0] - last[0]), abs(line[1] - last[1])) < 1e-7 * unit:
            break
        last = line
        width = _HUBER * unit
        if robust:
            weight = np.minimum(1.0, width / np.maximum(np.abs(residual), 1e-3 * width))
            spread = 1.4826 * float(np.median(np.abs(residual)))
        else:
            spread = float(np.sqrt(np.mean(residual**2)))
        sigma = float(np.hypot(np.sqrt(few) * LOCAL_ERROR * unit, np.sqrt(1 - few) * max(spread, 1e-3 * unit)))
    return evidence


def _independent(points: Float64, shape: tuple[int, ...]) -> float:
    """How many anchors of independent errors say as much of the image's line as these do, over their number.

    Anchors in one cell count once. What they share there belongs to the line itself once every cell holds some (a
    finite population: the variance of its mean falls to zero as it is sampled whole).
    """
    rows = np.clip(points[:, 1] * _CELLS[0] // shape[0], 0, _CELLS[0] - 1)
    columns = np.clip(points[:, 0] * _CELLS[1] // shape[1], 0, _CELLS[1] - 1)
    cells = len(np.unique(rows * _CELLS[1] + columns))
    left = 1 - SHARED * (cells - 1) / (_CELLS[0] * _CELLS[1] - 1)
    return cells / (left * len(points))


def anchors_of(anchors: Any) -> tuple[Float64, Float64]:
    """uv (N, 2) and metres (N,). Raises CalibrationError for what is no such pair."""
    try:
        uv, metres = anchors
    except (TypeError, ValueError):
        raise CalibrationError("anchors must be a pair (uv, metres): uv (N, 2), metres (N,).") from None
    try:
        points, depths = np.asarray(uv, dtype=np.float64), np.asarray(metres, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"Anchors must be numbers: uv (N, 2) and metres (N,). {error}") from error
    if points.ndim != 2 or points.shape[1] != 2 or depths.shape != points.shape[:1]:
        raise CalibrationError(f"Anchors must be uv (N, 2) and metres (N,), not {points.shape} and {depths.shape}.")
    return points, depths


def _checked(size: Size, anchors: Any) -> tuple[Float64, Float64]:
    points, depths = anchors_of(anchors)
    if not len(depths):
        raise CalibrationError("There are too few anchors: none.")
    if not (np.isfinite(points).all() and np.isfinite(depths).all()):
        raise CalibrationError("Anchors must be finite; remove those with NaN or infinite uv or metres.")
    if (depths <= 0).any():
        raise CalibrationError("Anchor depths must be positive metres; remove zeros (no return) and negative values.")
    check_inside(size, points)
    return points, depths


def resized(points: Float64, before: Size, after: Size) -> Float64:
    """Pixels (N, 2) of an image of one size where they are in another, pixel centres at integers."""
    ratio = np.array(after) / np.array(before)
    return np.asarray((points + 0.5) * ratio - 0.5)


def check_inside(size: Size, points: Float64, name: str = "anchors") -> None:
    """Raises CalibrationError for pixels (N, 2) outside the image."""
    width, height = size
    outside = (points < -0.5).any(axis=1) | (points[:, 0] > width - 0.5) | (points[:, 1] > height - 0.5)
    if outside.any():
        u, v = points[outside][0]
        raise CalibrationError(
            f"{int(outside.sum())} {name} lie outside the {width}x{height} image, the first at ({u:g}, {v:g}). "
            "uv is (column, row) in pixels of the source image."
        )


def sample(plane: NDArray[np.float32], points: Float64) -> Float64:
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


def _check_spread(x: Float64, image: NDArray[np.float32]) -> None:
    low, high = percentiles(image)
    if float(np.ptp(x)) < MIN_SPREAD * (high - low):
        raise CalibrationError(
            f"The anchors are degenerate: their predictions span {float(np.ptp(x)) / (high - low):.1%} of the image's "
            f"range, and at least {MIN_SPREAD:.0%} is needed. Add anchors at clearly different depths."
        )
