"""From what a robot knows of a scene to depth, and why it is metric or not.

What is known goes to a `ScaleTracker`, by `Stream.put` or by its own `update`, with the same arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import CalibrationError, ConfigError
from densegeo.ros.ranges import Transform
from densegeo.runtime.camera import Camera
from densegeo.runtime.geometry import Geometry

Float64 = NDArray[np.float64]


class ImageContext(NamedTuple):
    """What is known of one image. camera: of its pixels, or None where it is unknown. points: measured, (N, 3) metres
    in the camera's frame. up: (3,) against gravity, there too. lacking: what was to be known and is not, in words.
    """

    camera: Camera | None = None
    points: Float64 | None = None
    up: Float64 | None = None
    lacking: tuple[str, ...] = ()

    @classmethod
    def of(cls, info: object | None, rectified: bool) -> ImageContext:
        """By a camera_info, before an image's size is known; lacking where there is none, or it has no calibration."""
        if info is None:
            return cls().without("no camera_info has come")
        try:
            return cls(Camera.from_camera_info(info, rectified))
        except ConfigError as error:
            return cls().without(f"camera_info cannot be used: {error}")

    def at(self, size: tuple[int, int] | None) -> ImageContext:
        """With the camera of an image's size; lacking where it is of another picture. None: the picture is not read."""
        if self.camera is None or size is None:
            return self._replace(camera=None)
        try:
            return self._replace(camera=self.camera.at(size))
        except ConfigError as error:
            return self._replace(camera=None).without(f"camera_info is of another picture: {error}")

    def without(self, lack: str) -> ImageContext:
        """With one more thing that is lacking, in words."""
        return self._replace(lacking=(*self.lacking, lack.rstrip(".")))


class MetresOptions(NamedTuple):
    """What holds for all images, in metres, 0 where it is unknown: the scene's smallest and largest depth, and the
    camera's height over the floor.
    """

    near: float = 0.0
    far: float = 0.0
    camera_height: float = 0.0


def rotated(up: Float64, into: Transform) -> Float64:
    """A direction from its own frame into the camera's."""
    return np.asarray(into.rotation @ up)


def tracker_arguments(context: ImageContext, options: MetresOptions) -> dict[str, Any]:
    """What `Stream.put` and `ScaleTracker.update` take of it."""
    if context.camera is None:
        return {}
    arguments: dict[str, Any] = {"intrinsics": context.camera}
    if (anchors := _anchors(context)) is not None:
        arguments["anchors"] = anchors
    if options.camera_height > 0:
        arguments["camera_height"] = options.camera_height
        if context.up is not None:
            arguments["up"] = context.up
    return arguments


def _anchors(context: ImageContext) -> tuple[Float64, Float64] | None:
    """The points that the image sees: pixels (M, 2) and z-depths (M,); None where there are none."""
    if context.points is None or context.camera is None or context.camera.size is None or not len(context.points):
        return None
    uv = context.camera.project(context.points)
    with np.errstate(invalid="ignore"):
        in_view = (uv >= -0.5).all(axis=1) & (uv < np.array(context.camera.size) - 0.5).all(axis=1)
    return (uv[in_view], context.points[in_view, 2]) if in_view.any() else None


def calibrated(
    geometry: Geometry, refusal: CalibrationError | None, context: ImageContext, options: MetresOptions
) -> tuple[Geometry, str]:
    """As a tracker left it, or between near and far where it is not metric; and in words why it is metric, or not."""
    if geometry.prediction is None:
        return geometry, "not there: the model has normals alone"
    if geometry.depth_kind != "metric" and options.far > 0:
        try:
            geometry = geometry.to_metric(near=options.near, far=options.far)
        except CalibrationError as error:
            refusal = error
    if geometry.depth_kind == "metric":
        return geometry, "; ".join((f"metric{_from_sources(geometry)}{_uncertain(geometry)}", *context.lacking))
    because = "; ".join(filter(None, (str(refusal).rstrip(".") if refusal else "", *context.lacking)))
    because = because or "nothing measures it: set camera_height, anchors, or near and far"
    if geometry.depth_kind == "up_to_scale":
        return geometry, f"up to scale{_from_sources(geometry)}, its unit unknown{_uncertain(geometry)}: {because}"
    return geometry, f"relative ({geometry.depth_kind}): {because}"


def _from_sources(geometry: Geometry) -> str:
    sources = geometry.calibration.sources if geometry.calibration else ()
    return f", from {' and '.join(sources)}" if sources else ""


def uncertainty(geometry: Geometry) -> float:
    """Of the line that leads to depth, a relative standard deviation at the image's median; NaN where it is unknown."""
    if geometry.calibration is None or geometry.prediction is None or not geometry.valid.any():
        return float("nan")
    middle = np.median(geometry.prediction[geometry.valid][::37])
    return float(geometry.calibration.uncertainty(np.asarray(middle, dtype=np.float64)))


def _uncertain(geometry: Geometry) -> str:
    spread = uncertainty(geometry)
    return f", give or take {100 * spread:.2g} %" if np.isfinite(spread) else ""
