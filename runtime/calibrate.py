"""From a prediction to depth: what is known is gathered as `Evidence` of a line, which becomes a `Calibration`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from densegeo.argument_checks import number_of, one_of
from densegeo.errors import CalibrationError, MissingOutputError
from densegeo.outputs import DepthKind
from densegeo.runtime.anchors import (
    LOCAL_ERROR,
    METHODS,
    AnchorFit,
    Method,
    anchors_of,
    check_inside,
    fit_anchors,
    resized,
    sample,
)
from densegeo.runtime.camera import Camera
from densegeo.runtime.edges import flying_pixels
from densegeo.runtime.evidence import Evidence
from densegeo.runtime.floor import checked_up, floor_evidence
from densegeo.runtime.metric import SPACES, Calibration, doubt_metres, percentiles, require_calibration
from densegeo.runtime.normals_scale import scale_from_normals
from densegeo.size import Size

if TYPE_CHECKING:
    from densegeo.runtime.geometry import Geometry

_SIZE_ERROR = 0.05  # of a size that is measured between two pixels, relative
_SIZE_FORM = "size must be a pair (uv, metres): uv (2, 2), two pixels; metres, their distance."


@dataclass(frozen=True)
class SceneMeasurements:
    """What a caller measured in the scene, and knows beside the intrinsics; see `Geometry.to_metric`.

    Raises ConfigError for no method, CalibrationError for anchors and a direction that cannot be.
    """

    anchors: Any = None
    camera_height: float | None = None
    up: Any = None
    size: Any = None
    method: Method = "robust"
    prior: Calibration | None = None

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        if self.anchors is not None:
            object.__setattr__(self, "anchors", anchors_of(self.anchors))
        if self.up is not None:
            checked_up(self.up)

    @property
    def any(self) -> bool:
        """Whether there is one; up only says where another one points."""
        return self.metres or self.prior is not None

    @property
    def metres(self) -> bool:
        """Whether one of them knows of metres."""
        metric_values = (self.anchors, self.camera_height, self.size)
        return any(value is not None for value in metric_values) or (self.prior is not None and self.prior.metric)


def require_one_way(line: tuple[object, object], ends: tuple[object, object], measurements: SceneMeasurements) -> None:
    """Raises CalibrationError unless exactly one is given: scale and shift, near and far, or measurements."""
    ways = sum(any(number is not None for number in pair) for pair in (line, ends)) + measurements.any
    if not ways and measurements.up is not None:
        raise CalibrationError("up only says where the floor is: give camera_height, in metres over it, too.")
    if ways != 1:
        raise CalibrationError(
            "Give exactly one of: scale and shift; near and far; measurements (anchors=(uv, metres), camera_height, "
            "size, prior)."
        )


def normals_evidence(geometry: Geometry, camera: Camera) -> Evidence:
    """Of the scale. Raises CalibrationError with the reason where normals do not tell, MissingOutputError without."""
    prediction = geometry.require_prediction("depth")
    if never := _never(geometry):
        raise (MissingOutputError if geometry.normals is None else CalibrationError)(never)
    assert geometry.normals is not None
    estimate = scale_from_normals(prediction, geometry.normals, geometry.valid, camera)
    return Evidence.of(1.0, 0.0, estimate.value, estimate.sigma, "normals")


def _never(geometry: Geometry) -> str:
    """Why the normals of no result of this model tell the scale; empty where they may."""
    other = "Give three anchors or more, or near and far."
    if geometry.normals is None:
        return f"{geometry.model or 'This model'} has no normals to take the scale from. {other}"
    if geometry.space != "log_affine":
        return f"Normals give the scale of log depth alone, and this result is {geometry.space}. {other}"
    return ""


def up_to_scale(geometry: Geometry, camera: Camera) -> Calibration:
    """From normals alone; the median depth is 1."""
    evidence = normals_evidence(geometry, camera)
    scale, _ = evidence.line
    middle = float(np.median(geometry.require_prediction("depth")[geometry.valid]))
    variance = 1 / float(evidence.information[0, 0])
    spread = (variance, variance * middle**2, -variance * middle)
    return Calibration("log_affine", scale, -scale * middle, sources=evidence.sources, variance=spread, metric=False)


def in_metres(geometry: Geometry, camera: Camera | None, measurements: SceneMeasurements) -> Calibration:
    """From measurements, and, where the camera is known, from normals. Raises CalibrationError unless they suffice."""
    kind = geometry.space
    if not measurements.metres:
        raise CalibrationError(
            "The unit of this prior is unknown (to_scale made it, or a tracker that was told no metres): it tells the "
            "scale alone. Give a measurement in metres with it: anchors, camera_height or size."
        )
    evidence, reason = gather(geometry, camera, measurements)
    fit: AnchorFit | None = None
    if measurements.anchors is not None:
        fit = anchor_fit(geometry, measurements, evidence, reason)
        evidence = fit.evidence
    if evidence.rank < 2:
        raise reason or CalibrationError(
            "This is one number, and depth has two: a scale and a shift. Give intrinsics too (normals then tell the "
            "scale), three anchors or more, or near and far."
        )
    return finished(kind, evidence, fit)


def anchor_fit(
    geometry: Geometry, measurements: SceneMeasurements, other_evidence: Evidence, reason: CalibrationError | None
) -> AnchorFit:
    """Of the measured anchors, away from steps in depth; `fit_anchors` says what it raises."""
    prediction = geometry.require_prediction("depth")
    trusted = geometry.valid & ~flying_pixels(prediction)
    source = Size(*geometry.source_size)
    return fit_anchors(
        geometry.space, prediction, trusted, measurements.anchors, measurements.method, other_evidence, reason, source
    )


def finished(kind: DepthKind, evidence: Evidence, fit: AnchorFit | None = None, *, metric: bool = True) -> Calibration:
    """The line that evidence of rank 2 gives, in metres or not. Raises CalibrationError unless scale is positive."""
    (scale, shift), covariance = evidence.line, evidence.covariance
    if not (scale > 0 and math.isfinite(shift)):
        raise CalibrationError(
            f"What is known gives the scale {scale:.3g} in {SPACES[kind].text}: it must be positive."
        )
    variance = (float(covariance[0, 0]), float(covariance[1, 1]), float(covariance[0, 1]))
    fit_summary = (fit.residual, fit.inliers, fit.count) if fit else (float("nan"), 0, 0)
    return Calibration(kind, scale, shift, *fit_summary, sources=evidence.sources, variance=variance, metric=metric)


def gather(
    geometry: Geometry, camera: Camera | None, measurements: SceneMeasurements, before: Evidence | None = None
) -> tuple[Evidence, CalibrationError | None]:
    """All evidence but the anchors', and why normals gave none. before: known already, and not returned."""
    kind, prediction = geometry.space, geometry.require_prediction("depth")
    percentiles(prediction[geometry.valid])
    evidence, reason = Evidence.nothing(), None
    if measurements.prior is not None:
        require_calibration("prior", measurements.prior, kind)
        evidence += measurements.prior.prior_for(prediction[geometry.valid])
    if never := _never(geometry):
        reason = CalibrationError(never)
    elif camera is not None:
        try:
            evidence += normals_evidence(geometry, camera)
        except CalibrationError as error:
            reason = error
    other_evidence = evidence + (before or Evidence.nothing())
    if measurements.camera_height is not None:
        evidence += floor_evidence(
            geometry, _needed(camera, "camera_height"), other_evidence, measurements.camera_height, measurements.up
        )
    if measurements.size is not None:
        evidence += _size_evidence(geometry, _needed(camera, "size"), other_evidence, measurements.size, reason)
    return evidence, reason


def _needed(camera: Camera | None, measurement: str) -> Camera:
    if camera is None:
        raise CalibrationError(f"{measurement} needs intrinsics: give them too.")
    return camera


def _size_evidence(
    geometry: Geometry, camera: Camera, other_evidence: Evidence, size: Any, reason: CalibrationError | None
) -> Evidence:
    """Of two pixels that are so many metres apart: with the scale known, of the shift."""
    kind, prediction, source = geometry.space, geometry.require_prediction("depth"), Size(*geometry.source_size)
    try:
        uv, length = size
        points, metres = np.asarray(uv, dtype=np.float64), number_of(length)
    except (TypeError, ValueError):
        raise CalibrationError(_SIZE_FORM) from None
    if metres is None or points.shape != (2, 2) or not (np.isfinite([*points.flat, metres]).all() and metres > 0):
        raise CalibrationError(_SIZE_FORM)
    doubt_metres("size", metres, stacklevel=5)
    check_inside(source, points, "pixels of size")
    if (points[0] == points[1]).all():
        raise CalibrationError("The two pixels of size are the same one: give the ends of what was measured.")
    if kind != "log_affine":
        raise CalibrationError(f"A size gives one number, and {kind} depth has two unknown ones. Give three anchors.")
    if not other_evidence.information[0, 0] > 0:
        raise reason or CalibrationError("A size needs the scale, which normals or the last frame tell.")
    points = resized(points, source, Size(*prediction.shape[::-1]))
    rays, p = camera.rays_at(points), sample(prediction, points)
    if not (np.isfinite(p).all() and np.isfinite(rays).all()):
        raise CalibrationError("The pixels of size lie on invalid depth.")
    scale, _ = other_evidence.line

    def apart(s: float) -> float:
        return math.log(float(np.linalg.norm(np.exp(s * p[1]) * rays[1] - np.exp(s * p[0]) * rays[0])))

    slope = (apart(scale * 1.01) - apart(scale / 1.01)) / (scale * (1.01 - 1 / 1.01))
    # t = ln(metres) - apart(s), linear near the scale that is known
    gap = math.log(metres) - apart(scale) + slope * scale
    error = math.hypot(_SIZE_ERROR, LOCAL_ERROR)
    return Evidence.of(slope, 1.0, gap, error, "a size")
