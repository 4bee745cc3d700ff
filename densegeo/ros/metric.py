"""From what a robot knows of a scene to metres, and why there are none."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import CalibrationError
from densegeo.runtime.geometry import Geometry


class Evidence(NamedTuple):
    """camera: a `Camera`, or None where it is unknown. points: measured, (N, 3) metres in the camera's frame. near,
    far: the scene's smallest and largest depth in metres, 0: unknown.
    """

    camera: Any = None
    points: NDArray[np.float64] | None = None
    near: float = 0.0
    far: float = 0.0


def anchors_of(evidence: Evidence, size: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The points that an image of `size` sees: pixels (M, 2) and z-depths (M,); None where there are none."""
    if evidence.points is None or evidence.camera is None or not len(evidence.points):
        return None
    uv = evidence.camera.at(size).project(evidence.points)
    with np.errstate(invalid="ignore"):
        seen = (uv >= -0.5).all(axis=1) & (uv < np.array(size) - 0.5).all(axis=1)
    if not seen.any():
        return None
    return uv[seen], evidence.points[seen, 2]


def calibrated(geometry: Geometry, evidence: Evidence) -> tuple[Geometry, str]:
    """In metres where the evidence allows it, else as it is; and a reason where it does not, "" otherwise."""
    if geometry.prediction is None or geometry.depth_kind == "metric":
        return geometry, ""
    anchors = anchors_of(evidence, geometry.source_size)
    try:
        if anchors is not None:
            return geometry.to_metric(anchors=anchors), ""
        if evidence.far > 0:
            return geometry.to_metric(near=evidence.near, far=evidence.far), ""
    except CalibrationError as error:
        return geometry, f"relative: {error}"
    return geometry, ""


def explain(geometry: Geometry) -> str:
    """In a few words why depth is metric, or why it is not."""
    if geometry.prediction is None:
        return "not there: the model has normals alone"
    if geometry.depth_kind == "metric":
        return f"metric: {geometry.calibration}" if geometry.calibration is not None else "metric"
    return f"relative ({geometry.depth_kind}): nothing measures it. Set near and far, or anchors and camera_info"
