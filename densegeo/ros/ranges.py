"""PointCloud2, LaserScan and Range -> points in their own frame, and from there into a camera's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densegeo.errors import ConfigError, ImageError

Float64 = NDArray[np.float64]

# sensor_msgs/PointField: datatype -> numpy's
_FIELDS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}


@dataclass(frozen=True)
class Transform:
    """Of points: rotation (3, 3), then translation (3,) in metres. From a source frame into a target frame."""

    rotation: Float64
    translation: Float64

    @classmethod
    def of(cls, numbers: ArrayLike) -> Transform:
        """x, y, z in metres and the quaternion x, y, z, w: geometry_msgs/Transform's order, the pose of the source
        frame in the target frame. Raises ConfigError unless these are seven finite numbers, the quaternion's length 1.
        """
        values = np.asarray(numbers, dtype=np.float64)
        if values.shape != (7,) or not np.isfinite(values).all():
            raise ConfigError("A transform is seven numbers: x, y, z in metres and a quaternion x, y, z, w.")
        length = float(np.linalg.norm(values[3:]))
        if abs(length - 1) > 1e-3:
            raise ConfigError(f"The transform's quaternion {values[3:].tolist()} has length {length:.4g}, not 1.")
        x, y, z, w = values[3:] / length
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        return cls(rotation, values[:3])

    @classmethod
    def of_message(cls, transform: Any) -> Transform:
        """A geometry_msgs/Transform. Raises ConfigError."""
        t, q = transform.translation, transform.rotation
        return cls.of([t.x, t.y, t.z, q.x, q.y, q.z, q.w])

    def then(self, following: Transform) -> Transform:
        """First this one, then another."""
        rotation = following.rotation
        return Transform(rotation @ self.rotation, rotation @ self.translation + following.translation)

    def inverse(self) -> Transform:
        """From the target back to the source."""
        return Transform(self.rotation.T, -self.rotation.T @ self.translation)

    def __call__(self, points: Float64) -> Float64:
        """(N, 3) -> (N, 3)."""
        return np.asarray(points @ self.rotation.T + self.translation)


IDENTITY = Transform(np.eye(3), np.zeros(3))


def read_points(message: Any) -> Float64:
    """A PointCloud2, LaserScan or Range -> its finite points (N, 3), metres, in the message's frame.

    Known by its fields. A scan's and a range's x axis points forward (REP 103); readings outside [range_min, range_max]
    are left out, and so is one at the maximum, which says that nothing was hit. Raises ImageError for anything else and
    for a cloud without x, y and z.
    """
    if hasattr(message, "point_step"):
        return _cloud(message)
    if hasattr(message, "angle_increment"):
        return _scan(message)
    if hasattr(message, "radiation_type"):
        reading = float(message.range)
        in_range = np.isfinite(reading) and message.min_range <= reading < message.max_range
        return np.array([[reading, 0.0, 0.0]]) if in_range else np.empty((0, 3))
    raise ImageError(f"Ranges come as PointCloud2, LaserScan or Range, not as {type(message).__name__}.")


def _cloud(message: Any) -> Float64:
    order = ">" if message.is_bigendian else "<"
    places = {field.name: field for field in message.fields}
    missing = [axis for axis in "xyz" if axis not in places]
    if missing:
        raise ImageError(f"The point cloud has no field {', '.join(missing)}; it has {', '.join(places) or 'none'}.")
    width, height, step, row = (int(getattr(message, name)) for name in ("width", "height", "point_step", "row_step"))
    if width * height == 0:
        return np.empty((0, 3))
    data = np.frombuffer(message.data, np.uint8)
    row = row if height > 1 else width * step  # drivers leave it 0 for clouds of one row
    if row < width * step or data.size < row * (height - 1) + width * step:
        raise ImageError(f"The point cloud has {data.size} bytes; {height} rows of {width} points of {step} are more.")
    points = np.empty((height, width, 3))
    for column, axis in enumerate("xyz"):
        field = places[axis]
        kind = np.dtype(order + _FIELDS[field.datatype]) if field.datatype in _FIELDS else None
        if kind is None or field.offset + kind.itemsize > step:
            raise ImageError(f"The point cloud's field {axis} has datatype {field.datatype} at byte {field.offset}.")
        points[..., column] = np.ndarray((height, width), kind, data, field.offset, (row, step))
    flat = points.reshape(-1, 3)
    return flat[np.isfinite(flat).all(axis=1)]


def _scan(message: Any) -> Float64:
    ranges = np.asarray(message.ranges, dtype=np.float64)
    angles = message.angle_min + message.angle_increment * np.arange(len(ranges))
    with np.errstate(invalid="ignore"):
        in_range = np.isfinite(ranges) & (ranges >= message.range_min) & (ranges < message.range_max)
    ranges, angles = ranges[in_range], angles[in_range]
    return np.stack([ranges * np.cos(angles), ranges * np.sin(angles), np.zeros_like(ranges)], axis=1)
