"""`Geometry`: what an estimator returns, and how it becomes metres, other frames, points, files and pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densegeo.argument_checks import path_of, require_flags
from densegeo.errors import CalibrationError, CalibrationWarning, ConfigError, MissingOutputError, NotMetricError
from densegeo.outputs import DepthKind, Frame
from densegeo.runtime.camera import Camera, CameraLike
from densegeo.runtime.decode import axes_of, turned
from densegeo.runtime.edges import flying_pixels
from densegeo.runtime.metric import (
    Calibration,
    from_parameters,
    from_range,
    metric_depth,
    require_calibration,
    valid_in,
)
from densegeo.runtime.millimetres import to_millimetres
from densegeo.size import Size

if TYPE_CHECKING:
    from PIL import Image

    from densegeo.runtime.anchors import Method

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False, repr=False)
class Geometry:
    """Dense geometry of one image, at the image's resolution: depth, normals, or both.

    Attributes:
        prediction: (H, W) float32 in the network's own space (`depth_kind` says which line leads to metres), or None
            when the model has normals alone.
        depth_kind: "log_affine", "affine" or "disparity_affine" (see `metric`), once calibrated "metric" or
            "up_to_scale"; None without a prediction.
        normals: (H, W, 3) float32 unit vectors towards the camera, OpenCV frame (x right, y down, z forward; a wall
            that faces the camera is (0, 0, -1)), or None when the model has depth alone.
        valid: (H, W) bool, where there is a depth; of normals alone, where there is a normal.
        source_size: The image's (width, height).
        timings: Stage -> milliseconds; "total" is their sum.
        model: The bundle's model.
        calibration: How it became metric, or None.

    Raises:
        ConfigError: Neither a prediction nor normals are given.

    Example:
        >>> import numpy as np
        >>> flat = np.full((4, 6), 0.5, np.float32)
        >>> geometry = Geometry(flat, "log_affine", None, np.ones((4, 6), bool), Size(6, 4))
        >>> metric = geometry.to_metric(scale=2.0, shift=0.0)  # ln(depth) = 2 * 0.5 + 0
        >>> round(float(metric.depth[0, 0]), 3)
        2.718
        >>> metric.points((5.0, 5.0, 2.5, 1.5)).shape
        (4, 6, 3)
    """

    prediction: Float | None
    depth_kind: DepthKind | None
    normals: Float | None
    valid: NDArray[np.bool_]
    source_size: Size
    timings: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.prediction is None and self.normals is None:
            raise ConfigError("A Geometry has a prediction, normals, or both.")
        if (self.prediction is None) != (self.depth_kind is None):
            raise ConfigError("A Geometry has a depth_kind where it has a prediction.")

    @cached_property
    def depth(self) -> Float:
        """(H, W) float32 z-depth along the optical axis, NaN where invalid: in metres, or, of a result
        "up_to_scale", in an unknown unit in which the median is 1.

        Raises NotMetricError for other kinds, MissingOutputError of normals alone.
        """
        prediction = self.require_depth("depth")
        depth = prediction if self.calibration is None else metric_depth(prediction, self.calibration)
        usable = self.valid & np.isfinite(depth) & (depth > 0)
        return np.where(usable, depth, np.float32(np.nan))

    def to_scale(self, intrinsics: CameraLike) -> Geometry:
        """A copy of kind "up_to_scale": true shape in an unknown unit, from normals and the camera alone.

        Args:
            intrinsics: As in `points`.

        Returns:
            The copy; its `calibration` holds the scale and its uncertainty.

        Raises:
            CalibrationError: Normals do not tell, with the reason; or depth is not log-affine.
            MissingOutputError: There are no normals.
        """
        from densegeo.runtime.calibrate import up_to_scale

        return self.calibrated(up_to_scale(self, self.camera(intrinsics)))

    def to_metric(
        self,
        intrinsics: CameraLike | None = None,
        *,
        scale: float | None = None,
        shift: float | None = None,
        near: float | None = None,
        far: float | None = None,
        anchors: tuple[ArrayLike, ArrayLike] | None = None,
        camera_height: float | None = None,
        up: ArrayLike | None = None,
        size: tuple[ArrayLike, float] | None = None,
        method: Method = "robust",
        prior: Calibration | None = None,
    ) -> Geometry:
        """A metric copy.

        From `scale` and `shift`; from `near` and `far`; or from any of `anchors`, `camera_height`, `size` and `prior`,
        which are weighed together with what normals tell where `intrinsics` are given.

        Args:
            intrinsics: As in `points`. With them, log-affine depth with normals needs one more measurement; without,
                three anchors.
            scale: With `shift`, the line of the depth kind, for example ln(depth) = scale * prediction + shift.
            shift: See `scale`.
            near: Metres of the nearest valid pixel, with `far`.
            far: Metres of the farthest valid pixel.
            anchors: (uv, metres): uv (N, 2) pixel coordinates (column, row) in the source image (also for a result of
                `resolution="network"`), pixel centres at integers; metres (N,) measured z-depths.
            camera_height: Metres over the floor.
            up: (3,) against gravity in the camera's OpenCV frame; by default the floor's own normals, for a camera that
                is level within 35 degrees.
            size: (uv, metres): two pixels (2, 2) of the source image and their distance.
            method: "robust" (almost half of the anchors may be wrong) or "least_squares".
            prior: The `calibration` of the last frame, whose line this one's should be near: counted as 2 % less
                certain in scale and depth than it was, so that a chain of priors forgets. Of one whose unit is unknown
                (`to_scale`) the scale alone counts. `ScaleTracker` reads off how frames differ.

        Returns:
            The copy; its `calibration` says what it rests on, how well anchors are met, and how uncertain it is. A
            CalibrationWarning says where anchors or intrinsics look wrong.

        Raises:
            CalibrationError: These do not determine a positive scale, or the result is metric already.
            MissingOutputError: The model has normals alone.
        """
        from densegeo.runtime.calibrate import SceneMeasurements, in_metres, require_one_way

        kind, prediction = self.space, self.require_prediction("depth")
        if prior is not None:
            require_calibration("prior", prior, kind)
        measurements = SceneMeasurements(anchors, camera_height, up, size, method, prior)
        require_one_way((scale, shift), (near, far), measurements)
        if measurements.any:
            calibration = in_metres(self, None if intrinsics is None else self.camera(intrinsics), measurements)
        elif scale is not None and shift is not None:
            calibration = from_parameters(kind, scale, shift)
        elif near is not None and far is not None:
            calibration = from_range(kind, prediction[self.valid], near, far)
        else:
            raise CalibrationError("Two numbers are needed: give scale with shift, or near with far.")
        return self.calibrated(calibration)

    @property
    def space(self) -> DepthKind:
        """The kind in which the prediction is a line of depth. Raises CalibrationError for a metric result."""
        self.require_prediction("depth")
        assert self.depth_kind is not None
        if self.depth_kind == "metric":
            raise CalibrationError("This result is metric already; calibrate the one the estimator returned.")
        return self.calibration.kind if self.calibration is not None else self.depth_kind

    def calibrated(self, calibration: Calibration) -> Geometry:
        """A copy by a line in the prediction's own space, of kind "metric", or "up_to_scale" where its unit is unknown.

        Args:
            calibration: The `calibration` of another result of this kind of depth.

        Returns:
            The copy. Pixels without a positive depth that float32 holds are invalid in it: a CalibrationWarning says
            how many.

        Raises:
            CalibrationError: No pixel is left, the calibration is of another kind of depth, or this result is metric.
            MissingOutputError: The model has normals alone.
        """
        require_calibration("calibration", calibration, self.space)
        valid = valid_in(calibration, self.require_prediction("depth"), self.valid)
        kind: DepthKind = "metric" if calibration.metric else "up_to_scale"
        return replace(self, depth_kind=kind, valid=valid, calibration=calibration)

    def normals_in(self, frame: Frame) -> Float | None:
        """The normals in another frame.

        Args:
            frame: "opencv" or "ros_optical" (x right, y down, z forward), "opengl" or "marigold" (x right, y up, z to
                the viewer), "dsine" (left, up, back), or "ros_body" (x forward, y left, z up).

        Returns:
            (H, W, 3) float32 unit vectors, or None when the model has no normals.

        Raises:
            ConfigError: For a frame that is none.
        """
        axes = axes_of(frame)
        return None if self.normals is None else turned(self.normals, axes)

    def points(self, intrinsics: CameraLike, *, drop_flying: bool = False) -> Float:
        """The points that are seen, in the OpenCV camera frame (x right, y down, z forward).

        Args:
            intrinsics: What `Camera.of` takes, such as a 3x3 matrix, (fx, fy, cx, cy) or a ROS CameraInfo, in pixels of
                the source image, pixel centres at integers. Those that do not look like this image's give a
                CalibrationWarning.
            drop_flying: Leave out pixels in the air between two surfaces, where depth and normals disagree. Where the
                scale is only a guess they disagree everywhere. (Anchors are never taken from pixels beside a step in
                depth.)

        Returns:
            (H, W, 3) float32, in metres (of a result "up_to_scale" in its unknown unit), NaN where invalid.

        Raises:
            NotMetricError: There is no depth yet.
            MissingOutputError: The model has normals alone.
            ConfigError: For unusable intrinsics.
        """
        require_flags(drop_flying=drop_flying)
        depth, camera = self.depth, self.camera(intrinsics)
        assert camera.size is not None
        points = camera.rays(camera.size) * depth[..., None]
        if drop_flying:
            points[flying_pixels(self.require_prediction("depth"), self.normals, points)] = np.nan
        return points

    def camera(self, intrinsics: CameraLike) -> Camera:
        """The camera of this result's pixels.

        Args:
            intrinsics: Of the source image, as in `points`; those that do not look like its own give a
                CalibrationWarning.

        Returns:
            The camera, of the size of this result's maps.

        Raises:
            ConfigError: For unusable intrinsics.
        """
        camera = Camera.of(intrinsics).at(self.source_size)
        if camera.doubt:
            warnings.warn(f"Are these this image's intrinsics? {camera.doubt}.", CalibrationWarning, stacklevel=3)
        height, width = self.valid.shape
        return camera.stretched((width, height))

    def points_in(self, frame: Frame, intrinsics: CameraLike, *, drop_flying: bool = False) -> Float:
        """`points` in another frame.

        Args:
            frame: As in `normals_in`.
            intrinsics: As in `points`.
            drop_flying: As in `points`.

        Returns:
            (H, W, 3) float32, in metres (of a result "up_to_scale" in its unknown unit), NaN where invalid.

        Raises:
            NotMetricError: There is no depth yet.
            MissingOutputError: The model has normals alone.
            ConfigError: For unusable intrinsics, or a frame that is none.
        """
        return turned(self.points(intrinsics, drop_flying=drop_flying), axes_of(frame))

    def millimetres(self) -> NDArray[np.uint16]:
        """Depth in millimetres as images of 16 bits hold it (REP 118).

        Returns:
            (H, W) uint16, 0 where depth is invalid or beyond 65.535 m; in the latter case a line in the log says how
            much was cut off.

        Raises:
            NotMetricError: There is no depth in metres.
            MissingOutputError: The model has normals alone.
        """
        self.require_depth("depth in millimetres", metres=True)
        return to_millimetres(self.depth, self.model or "depth")

    def encode(
        self,
        format: str,
        *,
        file: str = "",
        intrinsics: CameraLike | None = None,
        image: object = None,
        color: str = "rgb",
        dtype: Literal["float32", "float16"] = "float32",
        source: Mapping[str, Any] | None = None,
        drop_flying: bool = False,
    ) -> bytes:
        """The result as one file of a format of `save`, in memory: `geometry.encode("png16")`.

        Args:
            format: As in `save`, which writes the same bytes.
            file: Which file, where the format has several here, such as "normals.png" of "png".
            intrinsics: As in `save`.
            image: As in `save`.
            color: As in `save`.
            dtype: As in `save`.
            source: As in `save`.
            drop_flying: As in `save`.

        Returns:
            The file's bytes.

        Raises:
            NotMetricError: The format needs metres, or depth.
            MissingOutputError: The model lacks what the format holds.
            ConfigError: For a format, file or option that is none.
            ImageError: For an image that cannot be used.
        """
        from densegeo.runtime.encoders import Extras
        from densegeo.runtime.writers import encode

        return encode(self, format, file, Extras(intrinsics, image, color, dtype, source, drop_flying))

    def save(
        self,
        directory: str | os.PathLike[str],
        formats: Sequence[str] = ("npy", "png"),
        *,
        stem: str = "",
        intrinsics: CameraLike | None = None,
        image: object = None,
        color: str = "rgb",
        dtype: Literal["float32", "float16"] = "float32",
        source: Mapping[str, Any] | None = None,
        drop_flying: bool = False,
    ) -> list[Path]:
        """Write the result into a directory, which is made when missing. All files appear, or none.

        Args:
            directory: Where.
            formats: Of `densegeo.formats.RESULTS`: "npy" (arrays and geometry.json), "npz", "json", "png" (colour depth
                and normals), "grey8", "grey16" (depth of any kind), "png16" (millimetres, 0 invalid; metric only),
                "ply" (points) and "glb" (a mesh; both need depth and intrinsics), "exr" (needs the extra `exr`).
            stem: Prefix of the names.
            intrinsics: As in `points`, for ply and glb.
            image: The one that this result is of, for the colours of ply and glb.
            color: Channel order of an array given as `image`.
            dtype: Of the arrays in npy, npz and exr.
            source: What goes into geometry.json under this name.
            drop_flying: As in `points`, for ply and glb.

        Returns:
            The files' paths.

        Raises:
            NotMetricError: A format needs metres, or depth.
            MissingOutputError: The model lacks what a format holds.
            ConfigError: For a format or option that is none.
            ImageError: For an image that cannot be used.
            ResourceError: The disk is full, or the directory cannot be written.
        """
        from densegeo.runtime.encoders import Extras
        from densegeo.runtime.writers import save

        extras = Extras(intrinsics, image, color, dtype, source, drop_flying)
        return save(self, path_of("directory", directory), formats, stem, extras)

    def visualize(
        self, image: object = None, *, color: str = "rgb", span: tuple[float, float] | None = None
    ) -> Image.Image:
        """A picture: the source image if it is given, coloured depth (near warm, far cool) and normals, side by side.

        Args:
            image: As the estimator takes it; its size must be `source_size`.
            color: Channel order of arrays.
            span: What the two ends of the colours stand for, in metres where `depth_kind` is "metric", else in the
                prediction's own values; the same for several results gives them the same colours. By default the 2nd
                and 98th percentile.

        Returns:
            A PIL image; of depth and normals what there is.

        Raises:
            ImageError: For an image that cannot be used, or of another size.
            ConfigError: For a span that is none.
        """
        from densegeo.runtime.pictures import side_by_side

        return side_by_side(self, image, color, span)

    def __str__(self) -> str:
        """Three lines: what it is of, its depth, its normals."""
        from densegeo.runtime.description import describe

        return describe(self)

    def __repr__(self) -> str:
        height, width = self.valid.shape
        return f"<Geometry {width}x{height} depth_kind={self.depth_kind!r} normals={self.normals is not None}>"

    @property
    def has_depth(self) -> bool:
        """Whether `depth` can be asked for."""
        return self.depth_kind in ("metric", "up_to_scale")

    def require_prediction(self, product: str) -> Float:
        """The prediction, for what cannot be made without one.

        Args:
            product: What is to be made, as the error names it.

        Returns:
            (H, W) float32 in the network's own space.

        Raises:
            MissingOutputError: The model has normals alone.
        """
        if self.prediction is None:
            raise MissingOutputError(
                f"There is no {product}: {self.model or 'this model'} predicts normals alone. Use one that has depth."
            )
        return self.prediction

    def require_depth(self, product: str, *, metres: bool = False) -> Float:
        """The prediction, for what cannot be made before `depth` can be asked for.

        Args:
            product: What is to be made, as the error names it.
            metres: Whether it needs metres, and not depth of any unit.

        Returns:
            (H, W) float32 in the network's own space.

        Raises:
            NotMetricError: There is no depth yet, or none in metres.
            MissingOutputError: The model has normals alone.
        """
        prediction = self.require_prediction(product)
        if self.depth_kind == "up_to_scale" and metres:
            raise NotMetricError(
                f"There is no {product}: this result is up to scale, its unit is unknown. Calibrate the one the "
                "estimator returned with to_metric(intrinsics, ...) and a measurement: an anchor, the camera's "
                "height, a size."
            )
        if not self.has_depth:
            raise NotMetricError(
                f"There is no {product}: this result is {self.depth_kind}, known only up to a scale and a shift. "
                "Calibrate it first with to_metric(near=..., far=...), to_metric(anchors=(uv, metres)) or "
                "to_metric(scale=..., shift=...), or, without measurements, to_scale(intrinsics)."
            )
        return prediction
