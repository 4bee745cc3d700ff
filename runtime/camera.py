"""`Camera`: a lens and the image it belongs to, from whatever form intrinsics come in, and the ray behind each pixel.

Pixel centres are at integers. Rays are in the OpenCV camera frame (x right, y down, z forward) with z = 1. Distortion
is undone on rays, never on pictures: depth and normals stay at the pixels that the network saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densegeo.argument_checks import items_of, number_of, one_of, path_of, require_flags, shown, size_of
from densegeo.errors import ConfigError
from densegeo.runtime import camera_info
from densegeo.runtime.lens import LENSES, Lens, distort, undistort
from densegeo.size import Size

Float64 = NDArray[np.float64]
Float = NDArray[np.float32]
_ASPECT = 0.01  # two sizes are of one picture when their aspect ratios differ by less
_NARROW, _WIDE = 3.0, 150.0  # degrees; a pinhole outside is more likely a mistake


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with an optional distortion.

    Attributes:
        fx: Focal length along x, in pixels; so is `fy` along y.
        fy: See `fx`.
        cx: Column of the principal point, pixel centres at integers; `cy` is its row.
        cy: See `cx`.
        size: (width, height) of the image they belong to; None: of whatever image they are used with. With a size,
            images of other sizes and the same aspect ratio are taken as resized ones, and the numbers follow. Any pair
            is taken.
        lens: ROS' distortion model: "plumb_bob", "rational_polynomial" or "equidistant".
        distortion: Its coefficients in OpenCV's order: k1 k2 p1 p2 [k3]; k1 k2 p1 p2 k3 k4 k5 k6; k1 k2 k3 k4. Empty:
            none.

    Raises:
        ConfigError: For what cannot be the numbers of a camera.

    Example:
        >>> camera = Camera.from_fov(90, (640, 480))
        >>> round(camera.fx), camera.cx, camera.cy
        (320, 319.5, 239.5)
        >>> round(Camera.of(camera).at((320, 240)).fx)
        160
    """

    fx: float
    fy: float
    cx: float
    cy: float
    size: Size | None = None
    lens: Lens = "plumb_bob"
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("fx", "fy", "cx", "cy"):
            value = getattr(self, name)
            if (number := number_of(value)) is None:
                raise ConfigError(f"{name} must be a number, in pixels, not {shown(value)}.")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "distortion", _coefficients(self.distortion))
        if self.size is not None:
            object.__setattr__(self, "size", size_of("size", self.size))
        numbers = (self.fx, self.fy, self.cx, self.cy, *self.distortion)
        if not all(map(math.isfinite, numbers)) or self.fx <= 0 or self.fy <= 0:
            raise ConfigError("Intrinsics must be finite with positive focal lengths, in pixels.")
        if not isinstance(self.lens, str) or self.lens not in LENSES:
            raise ConfigError(f"There is no distortion model {shown(self.lens)}; choose from {', '.join(LENSES)}.")
        if len(self.distortion) not in LENSES[self.lens]:
            counts = " or ".join(str(count) for count in LENSES[self.lens] if count)
            raise ConfigError(f"{self.lens} has {counts} coefficients, not {len(self.distortion)}.")

    @classmethod
    def of(cls, intrinsics: CameraLike) -> Camera:
        """Any form of intrinsics as a Camera.

        Args:
            intrinsics: A Camera; (fx, fy, cx, cy); a matrix 3x3, 3x4, or its 9 or 12 numbers; a ROS CameraInfo, a
                mapping with its fields, or camera_info's YAML as a mapping.

        Returns:
            The camera; of a known size where the intrinsics say it.

        Raises:
            ConfigError: For anything else, for skew, and for a camera without a calibration.
        """
        if isinstance(intrinsics, Camera):
            return intrinsics
        if isinstance(intrinsics, Mapping) or camera_info.looks_like(intrinsics):
            return cls.from_camera_info(intrinsics)
        try:
            values: Float64 = np.asarray(intrinsics, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if values.shape == (4,):
            values = np.array([[values[0], 0, values[2]], [0, values[1], values[3]], [0, 0, 1]])
        return cls(*_pinhole(values))

    @classmethod
    def from_fov(cls, degrees: float, size: tuple[int, int], axis: Literal["x", "y", "diagonal"] = "x") -> Camera:
        """Square pixels and a centred axis, from a field of view.

        Args:
            degrees: The angle that the image covers, between 0 and 180.
            size: (width, height) of the image, in pixels.
            axis: Along which the angle is: "x", "y" or "diagonal".

        Returns:
            The camera, of that size, without distortion.

        Raises:
            ConfigError: For another angle, and for what is no size.
        """
        angle = number_of(degrees)
        if angle is None or not 0 < angle < 180:
            raise ConfigError(f"A field of view is in degrees between 0 and 180, not {shown(degrees)}.")
        one_of("axis", axis, ("x", "y", "diagonal"))
        width, height = size_of("size", size)
        extent = {"x": width, "y": height, "diagonal": math.hypot(width, height)}[axis]
        focal = 0.5 * extent / math.tan(math.radians(angle) / 2)
        return cls(focal, focal, 0.5 * (width - 1), 0.5 * (height - 1), Size(width, height))

    @classmethod
    def from_camera_info(cls, info: object, rectified: bool = False) -> Camera:
        """From a ROS CameraInfo.

        Binning and region of interest are applied as image_geometry does: (c - offset) / binning. The rotation R and
        P's fourth column (a stereo baseline) move a rectified camera and do not change its rays in its own frame.

        Args:
            info: Of ROS 2 or ROS 1, or a mapping with its fields, or camera_info's YAML as a mapping.
            rectified: The image is the rectified one: its camera is P, without distortion; otherwise K with D.

        Returns:
            The camera; its size is the calibration's, None where that is 0.

        Raises:
            ConfigError: For an uncalibrated camera (K[0] = 0) and for what a CameraInfo cannot be.
        """
        require_flags(rectified=rectified)
        fields = camera_info.read(info, rectified)
        fx, fy, cx, cy = _pinhole(fields.matrix)
        bin_x, bin_y = fields.binning
        x, y = fields.offset
        size = Size(*fields.size) if all(fields.size) else None
        return cls(fx / bin_x, fy / bin_y, (cx - x) / bin_x, (cy - y) / bin_y, size, fields.lens, fields.distortion)

    @classmethod
    def read(cls, path: str | Path, rectified: bool = False) -> Camera:
        """From a file: ROS' camera_info YAML (needs the extra `camera`), or the same as JSON.

        Args:
            path: The file.
            rectified: As in `from_camera_info`.

        Returns:
            As `from_camera_info`.

        Raises:
            ConfigError: The file cannot be read or used; the message names it.
        """
        file = path_of("path", path)
        info = camera_info.load(file)
        try:
            return cls.from_camera_info(info, rectified)
        except ConfigError as error:
            raise ConfigError(f"The camera file {file} cannot be used. {error}") from error

    def at(self, size: tuple[int, int]) -> Camera:
        """The camera of the same picture at another size.

        Args:
            size: (width, height) in pixels.

        Returns:
            The camera, of that size; where it had none before, with its numbers unchanged.

        Raises:
            ConfigError: This camera's size has another aspect ratio: then the picture was cropped, and only its maker
                knows where.
        """
        target_size = size_of("size", size)
        if self.size is None or self.size == target_size:
            return replace(self, size=target_size)
        x, y = target_size.width / self.size.width, target_size.height / self.size.height
        # a side may have been rounded to a whole pixel
        if abs(x / y - 1) > max(_ASPECT, 1 / min(target_size), 1 / min(self.size)):
            raise ConfigError(
                f"The intrinsics belong to an image of {self.size}, this one is {target_size}, another aspect ratio: "
                "it was cropped. Give the intrinsics of the cropped image: (fx, fy, cx - left, cy - top)."
            )
        return self.stretched(target_size)

    def stretched(self, size: tuple[int, int]) -> Camera:
        """The camera of the same picture at another size, whatever its aspect ratio.

        Args:
            size: (width, height) in pixels.

        Returns:
            The camera, of that size, with its focal lengths and centre scaled along each axis.

        Raises:
            ConfigError: This camera has no size, or what is given is none.
        """
        if self.size is None:
            raise ConfigError("Only the camera of an image of known size can be stretched to another.")
        target_size = size_of("size", size)
        x, y = target_size.width / self.size.width, target_size.height / self.size.height
        return replace(
            self,
            fx=self.fx * x,
            fy=self.fy * y,
            cx=(self.cx + 0.5) * x - 0.5,
            cy=(self.cy + 0.5) * y - 0.5,
            size=target_size,
        )

    def rays(self, size: tuple[int, int]) -> Float:
        """The ray of every pixel, computed once for each camera and size; read-only.

        Args:
            size: (width, height) of the image.

        Returns:
            (H, W, 3) float32 with z = 1; NaN where the lens has none in front.

        Raises:
            ConfigError: As `at`.
        """
        return _rays(self.at(size))

    def rays_at(self, uv: ArrayLike) -> Float64:
        """The rays of some pixels of this camera's own image.

        Args:
            uv: (N, 2) column and row, pixel centres at integers.

        Returns:
            (N, 3) float64 with z = 1.

        Raises:
            ConfigError: For what is no such array.
        """
        points = _rows("uv", uv, 2)
        x, y = (points[:, 0] - self.cx) / self.fx, (points[:, 1] - self.cy) / self.fy
        x, y = undistort(x, y, self.lens, self.distortion)
        return np.stack([x, y, np.ones_like(x)], axis=-1)

    def project(self, points: ArrayLike) -> Float64:
        """Where points appear.

        Args:
            points: (N, 3) in the camera's frame (x right, y down, z forward).

        Returns:
            (N, 2) float64 column and row; NaN behind the camera.

        Raises:
            ConfigError: For what is no such array.
        """
        xyz = _rows("points", points, 3)
        with np.errstate(all="ignore"):
            z = np.where(xyz[:, 2] > 0, xyz[:, 2], np.nan)
            x, y = distort(xyz[:, 0] / z, xyz[:, 1] / z, self.lens, self.distortion)
        return np.stack([x * self.fx + self.cx, y * self.fy + self.cy], axis=-1)

    @property
    def doubt(self) -> str | None:
        """Why these intrinsics do not look like those of an image of `size`, or None. For warnings."""
        if self.size is None:
            return None
        width, height = self.size
        if max(self.fx, self.fy) < 10 and 0 <= self.cx <= 1 and 0 <= self.cy <= 1:
            return "they look normalised: multiply fx and cx by the image's width, fy and cy by its height"
        if not (0 <= self.cx < width and 0 <= self.cy < height):
            other = Size(round(2 * self.cx + 1), round(2 * self.cy + 1))
            hint = f", as of an image of about {other}: give the Camera its size" if min(other) > 1 else ""
            return f"the principal point ({self.cx:g}, {self.cy:g}) lies outside the {self.size} image{hint}"
        if not 0.5 < self.fx / self.fy < 2:
            return f"the focal lengths {self.fx:g} and {self.fy:g} differ by more than a factor of two"
        angle = 2 * math.degrees(math.atan2(0.5 * max(width, height), self.fx if width >= height else self.fy))
        if not _NARROW < angle < _WIDE:
            return f"they mean a field of view of {angle:.0f} degrees for a {self.size} image"
        return None


CameraLike: TypeAlias = Camera | Mapping[str, Any] | ArrayLike | object  # what `Camera.of` takes


def _coefficients(coefficients: object) -> tuple[float, ...]:
    items = items_of(coefficients)
    numbers = [number for number in map(number_of, items or ()) if number is not None]
    if items is not None and len(numbers) == len(items):
        return tuple(numbers)
    raise ConfigError(f"distortion must be a sequence of numbers, not {shown(coefficients)}.")


def _rows(name: str, values: ArrayLike, columns: int) -> Float64:
    """(N, columns) numbers."""
    try:
        rows = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        rows = np.empty(0)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ConfigError(f"{name} must be an array of numbers of shape (N, {columns}), not {shown(values)}.")
    return rows


def _pinhole(values: Float64) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy of a 3x3 or 3x4 matrix or its numbers in rows."""
    if values.shape in ((9,), (12,)):
        values = values.reshape(3, -1)
    if values.shape not in ((3, 3), (3, 4)):
        raise ConfigError(
            "Intrinsics must be a Camera, (fx, fy, cx, cy), a 3x3 or 3x4 matrix in pixels, or a ROS CameraInfo."
        )
    if values[0, 1] or values[1, 0] or tuple(values[2, :3]) != (0, 0, 1):
        raise ConfigError("Intrinsics with skew or a bottom row other than (0, 0, 1) are not supported.")
    fx, fy, cx, cy = (float(value) for value in values[[0, 1, 0, 1], [0, 1, 2, 2]])
    return fx, fy, cx, cy


@lru_cache(maxsize=8)
def _rays(camera: Camera) -> Float:
    assert camera.size is not None
    width, height = camera.size
    x = (np.arange(width) - camera.cx) / camera.fx
    y = (np.arange(height) - camera.cy) / camera.fy
    rays = np.ones((height, width, 3), dtype=np.float32)
    if any(camera.distortion) or camera.lens == "equidistant":
        grid_x, grid_y = np.broadcast_arrays(x[None, :], y[:, None])
        straight = undistort(grid_x.ravel(), grid_y.ravel(), camera.lens, camera.distortion)
        rays[..., 0], rays[..., 1] = (plane.reshape(height, width) for plane in straight)
        rays[~np.isfinite(rays[..., 0])] = np.nan
    else:
        rays[..., 0], rays[..., 1] = x[None, :], y[:, None]
    rays.flags.writeable = False
    return rays
