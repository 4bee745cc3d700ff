"""`ScaleTracker`: the line from prediction to depth, frame after frame, steady where each frame's own would jump.

A Kalman filter over scale and shift. Its prediction is not that both stay: the network normalises every frame anew, so
the same surfaces have another prediction in the next frame. How it changed is read off the two predictions (of a still
or slow camera, or one whose motion is given), and moves the line. Its measurements are normals, anchors, a height.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densegeo.argument_checks import shown
from densegeo.errors import CalibrationError, ConfigError
from densegeo.runtime.anchors import AnchorFit, Method, sample
from densegeo.runtime.calibrate import SceneMeasurements, anchor_fit, finished, gather
from densegeo.runtime.camera import Camera, CameraLike
from densegeo.runtime.edges import flying_pixels
from densegeo.runtime.evidence import Evidence
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.metric import DRIFT, SPACES, drift_noise

Float64 = NDArray[np.float64]

_POINTS = 6000  # pixels by which frames are compared
_REPEATED = 10.0  # frames that share a network's errors: each but the first counts as so much less
_VAGUE = 100.0  # standard deviation of ln(unit) before anything tells it
_STEP = (0.003, 0.006)  # relative error of a frame's alignment in scale, and in depth where the motion is known
_GATE = 9.0  # squared standard deviations beyond which evidence is not believed,
_PATIENCE = 5  # unless it comes this often in a row
_SAME = 0.8  # correlation of two frames' predictions below which they show different scenes
_TURNED = 40.0  # degrees between two frames' normals, in the median, above which they do


@dataclass(frozen=True, eq=False)
class Alignment:
    """p_before = alpha * p + beta for the same surfaces, over `count` pixels whose correlation is `agreement`."""

    alpha: float
    beta: float
    agreement: float
    count: int


def align(
    before: Geometry,
    after: Geometry,
    intrinsics: CameraLike | None = None,
    motion: ArrayLike | None = None,
) -> Alignment:
    """How the predictions of two frames go together, of a still camera or of one whose motion is given.

    motion: (4, 4), points of the camera before into the camera after; `before` must be in depth then, metric for a
    motion in metres, and intrinsics are needed. Raises CalibrationError where the frames show no common surface.
    """
    p, q = before.require_prediction("depth"), after.require_prediction("depth")
    if p.shape != q.shape:
        raise CalibrationError(f"Frames of {before.source_size} and {after.source_size} cannot be aligned.")
    step = max(1, int(np.sqrt(p.size / _POINTS)))
    part = (slice(step // 2, None, step), slice(step // 2, None, step))
    usable = (before.valid & ~flying_pixels(p))[part]
    first = p[part][usable].astype(np.float64)
    if motion is None:
        steady = (after.valid & ~flying_pixels(q))[part][usable]
        return _fitted(first[steady], q[part][usable][steady].astype(np.float64))
    if intrinsics is None or before.calibration is None:
        raise CalibrationError("motion needs intrinsics, and a frame before whose depth is known.")
    pose = checked_motion(motion)
    camera = after.camera(intrinsics)
    points = (camera.rays(p.shape[::-1])[part][usable] * before.depth[part][usable][:, None]).astype(np.float64)
    points = points @ pose[:3, :3].T + pose[:3, 3]
    uv = camera.project(points)
    height, width = q.shape
    in_view = np.isfinite(uv).all(axis=1) & (uv >= 0).all(axis=1) & (uv[:, 0] <= width - 1) & (uv[:, 1] <= height - 1)
    second = sample(np.where(after.valid & ~flying_pixels(q), q, np.float32(np.nan)), uv[in_view])
    # what the line before says of the depth that these points have now, as a prediction of the frame before
    line = before.calibration
    expected = (np.asarray(SPACES[line.kind].to(points[in_view, 2])) - line.shift) / line.scale
    known = np.isfinite(second) & np.isfinite(expected)
    return _fitted(expected[known], second[known])


def checked_motion(motion: ArrayLike) -> Float64:
    """(4, 4) float64. Raises ConfigError for what is no rigid motion."""
    try:
        pose = np.asarray(motion, dtype=np.float64)
    except (TypeError, ValueError):
        pose = np.empty(0)
    if pose.shape != (4, 4) or not np.isfinite(pose).all() or not np.allclose(pose[3], (0, 0, 0, 1)):
        raise ConfigError(
            "motion must be a (4, 4) matrix that takes points of the camera before into the camera after."
        )
    if not np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-3):
        raise ConfigError("motion's first three rows must hold a rotation and a translation in metres.")
    return pose


def _fitted(before: Float64, after: Float64) -> Alignment:
    """The line of the smallest products of misses (reduced major axis): noise in either does not shrink its slope."""
    if len(before) < 100:
        raise CalibrationError("The two frames have too few pixels in common to be aligned.")
    weight = np.ones(len(before))
    alpha, beta, agreement = 1.0, 0.0, 0.0
    for _ in range(8):
        total = weight.sum()
        mean_b, mean_a = (weight @ before) / total, (weight @ after) / total
        db, da = before - mean_b, after - mean_a
        var_b, var_a, mixed = (weight @ (db * db)), (weight @ (da * da)), (weight @ (da * db))
        if not (var_a > 1e-12 and var_b > 1e-12):
            raise CalibrationError("One of the two frames is flat: they cannot be aligned.")
        agreement = float(mixed / np.sqrt(var_a * var_b))
        alpha = float(np.sqrt(var_b / var_a))
        beta = float(mean_b - alpha * mean_a)
        miss = np.abs(before - alpha * after - beta)
        width = max(1.5 * float(np.median(miss)), 1e-4)
        weight = np.minimum(1.0, width / np.maximum(miss, 1e-9))
    return Alignment(alpha, beta, agreement, len(before))


class ScaleTracker:
    """Feed it frames in order; it is deterministic, and not for several threads at once.

    Without evidence of metres results are "up_to_scale", in one unit for as long as frames show one scene.
    resets: how often a scene change, or evidence that went on to disagree, made it start anew.

    Example:
        >>> import numpy as np
        >>> from densegeo.size import Size
        >>> ramp = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(48, 64)
        >>> frame = Geometry(ramp, "log_affine", None, np.ones((48, 64), bool), Size(64, 48))
        >>> anchors = [(5.0, 5.0), (32.0, 24.0), (60.0, 45.0)], [1.2, 2.0, 3.5]  # pixels, and their depth in metres
        >>> tracker = ScaleTracker()
        >>> tracker.update(frame, (50.0, 50.0, 31.5, 23.5), anchors=anchors).depth_kind
        'metric'
        >>> tracker.update(frame).depth_kind  # later frames need no anchors
        'metric'
    """

    def __init__(self) -> None:
        self.resets = 0
        self._state = Evidence.nothing()
        self._last: Geometry | None = None
        self._metres = False
        self._rejected = 0

    def reset(self) -> None:
        """Forget everything, as at a cut."""
        self._state, self._last, self._metres, self._rejected = Evidence.nothing(), None, False, 0

    def update(
        self,
        geometry: Geometry,
        intrinsics: CameraLike | None = None,
        *,
        anchors: Any = None,
        up: ArrayLike | None = None,
        camera_height: float | None = None,
        size: Any = None,
        motion: ArrayLike | None = None,
        method: Method = "robust",
    ) -> Geometry:
        """The next frame with its depth: "metric" once anything told metres, else "up_to_scale".

        Args:
            geometry: The frame's result.
            intrinsics: As in `Geometry.to_metric`; so are `anchors`, `up`, `camera_height`, `size` and `method`.
            anchors: See `intrinsics`.
            up: See `intrinsics`.
            camera_height: See `intrinsics`.
            size: See `intrinsics`.
            motion: (4, 4), points of the last frame's camera into this one's, the identity for a camera that stands
                still. Without it the camera may have moved, which makes the prediction less certain and evidence weigh
                more.
            method: See `intrinsics`.

        Returns:
            A copy; its `calibration` holds the line and its uncertainty.

        Raises:
            CalibrationError: Nothing is known of the line yet, also when normals alone were to tell and do not.
            ConfigError: For what is no result, and for a motion without intrinsics.
        """
        if not isinstance(geometry, Geometry):
            raise ConfigError(f"geometry must be a result of an estimator, a Geometry, not {shown(geometry)}.")
        motion = None if motion is None else checked_motion(motion)
        if motion is not None and intrinsics is None:
            raise ConfigError("motion moves points, which needs a camera: give intrinsics too, or leave motion out.")
        camera = None if intrinsics is None else geometry.camera(intrinsics)
        measurements = SceneMeasurements(anchors, camera_height, up, size, method)
        predicted = self._predicted(geometry, intrinsics, motion)
        first = predicted.rank == 0
        evidence, fit, reason = self._own_evidence(geometry, camera, measurements, predicted)
        if measurements.metres and evidence.information[1, 1] > 0 and not self._metres:
            # the first word of metres: the unit so far was made up
            predicted = _unitless(predicted)
            self._metres = True
        elif not first and predicted.surprise(evidence) > _GATE:
            self._rejected += 1
            if self._rejected >= _PATIENCE:
                self.resets += 1
                self.reset()
                return self.update(
                    geometry,
                    intrinsics,
                    anchors=anchors,
                    up=up,
                    camera_height=camera_height,
                    size=size,
                    method=method,
                )
            evidence, fit = Evidence.nothing(), None
        else:
            self._rejected = 0
        state = predicted + (evidence if first else _scaled(evidence, 1 / _REPEATED))
        if not state.information[0, 0] > 0:
            raise reason or CalibrationError(
                "Nothing is known of this frame's depth: give intrinsics, anchors, or both."
            )
        if first and not self._metres:
            state += Evidence.of(_median(geometry), 1.0, 0.0, 1e-3)
        if state.rank < 2:
            state += Evidence.of(0.0, 1.0, 0.0, _VAGUE)
        return self._with_depth(geometry, state, fit)

    def _with_depth(self, geometry: Geometry, state: Evidence, fit: AnchorFit | None) -> Geometry:
        sources = tuple(
            dict.fromkeys(source.split(" ")[-1] if "anchor" in source else source for source in state.sources)
        )
        calibration = finished(geometry.space, replace(state, sources=sources), fit, metric=self._metres)
        self._state = replace(state, sources=sources)
        result = geometry.calibrated(calibration)
        self._last = result
        return result

    def _predicted(self, geometry: Geometry, intrinsics: CameraLike | None, motion: ArrayLike | None) -> Evidence:
        """The last frame's line in this frame's prediction; nothing at the start and after a cut."""
        last = self._last
        if last is None:
            return Evidence.nothing()
        try:
            if (
                last.calibration is None
                or last.calibration.kind != geometry.space
                or _turned_degrees(last, geometry) > _TURNED
            ):
                raise CalibrationError("Another scene.")
            motion = motion if self._metres else None  # in metres it says nothing in an unknown unit
            alignment = align(last, geometry, intrinsics, motion)
            if alignment.agreement < _SAME:
                raise CalibrationError("Another scene.")
        except CalibrationError:
            self.resets += 1
            self.reset()
            return Evidence.nothing()
        scale = self._state.line[0]
        # the step's error grows with how badly the two frames agree
        worse = 1 + 20 * (1 - alignment.agreement)
        lift = DRIFT if motion is None else _STEP[1]
        noise = drift_noise(_median(geometry), _STEP[0] * worse * scale, lift * worse)
        predicted = self._state.after_step(alignment.alpha, alignment.beta, noise)
        return replace(predicted, sources=self._state.sources)

    def _own_evidence(
        self, geometry: Geometry, camera: Camera | None, measurements: SceneMeasurements, predicted: Evidence
    ) -> tuple[Evidence, AnchorFit | None, CalibrationError | None]:
        """What this frame says by itself; `predicted` only helps the robust fit of its anchors."""
        evidence, reason = gather(geometry, camera, measurements, predicted)
        if measurements.anchors is None:
            return evidence, None, reason
        other_evidence = _unitless(predicted + evidence) if not self._metres else predicted + evidence
        try:
            fit = anchor_fit(geometry, measurements, other_evidence, reason)
        except CalibrationError as error:  # on a depth edge, say: the frames before know enough
            if not self._metres:
                raise
            return evidence, None, error
        return evidence + _difference(fit.evidence, other_evidence), fit, reason


def _turned_degrees(before: Geometry, after: Geometry) -> float:
    """Degrees between the two frames' normals at the same pixels, median; 0 where one has none."""
    if before.normals is None or after.normals is None or before.normals.shape != after.normals.shape:
        return 0.0
    step = max(1, int(np.sqrt(before.valid.size / _POINTS)))
    a, b = before.normals[::step, ::step], after.normals[::step, ::step]
    cosines = np.clip((a * b).sum(axis=-1), -1, 1)
    return float(np.degrees(np.arccos(np.nanmedian(cosines))))


def _median(geometry: Geometry) -> float:
    return float(np.median(geometry.require_prediction("depth")[geometry.valid]))


def _scaled(evidence: Evidence, factor: float) -> Evidence:
    return replace(evidence, information=factor * evidence.information, vector=factor * evidence.vector)


def _difference(evidence: Evidence, other_evidence: Evidence) -> Evidence:
    return replace(
        evidence,
        information=evidence.information - other_evidence.information,
        vector=evidence.vector - other_evidence.vector,
    )


def _unitless(evidence: Evidence) -> Evidence:
    """What it says of the scale alone, whatever the shift."""
    if evidence.rank < 2:
        return replace(
            evidence, information=np.diag([evidence.information[0, 0], 0.0]), vector=evidence.vector * (1, 0)
        )
    return Evidence.of(1.0, 0.0, evidence.line[0], float(np.sqrt(evidence.covariance[0, 0]))) + replace(
        Evidence.nothing(), sources=evidence.sources
    )
