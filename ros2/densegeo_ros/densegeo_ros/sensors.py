"""What else measures: ranges for anchors, and an IMU for up, in the camera's frame."""

from __future__ import annotations

from collections import deque
from typing import Any

from rclpy.lifecycle import LifecycleNode
from rclpy.time import Time
from sensor_msgs.msg import Imu, LaserScan, PointCloud2, Range

from densegeo.errors import ConfigError, ImageError
from densegeo.ros.gravity import Gravity
from densegeo.ros.metric import ImageContext, rotated
from densegeo.ros.ranges import IDENTITY, Transform, read_points
from densegeo_ros.convert import nanoseconds

RANGE_SENSORS = {cls.__name__: cls for cls in (PointCloud2, LaserScan, Range)}
KEPT = 20  # messages of a sensor


class Frames:
    """Transforms between a sensor's frame and a camera's: the one that a parameter gave, or tf2's.

    Raises ConfigError where none is given and tf2_ros is not installed.
    """

    def __init__(self, node: LifecycleNode, fixed: Transform | None, parameter: str) -> None:
        self._fixed, self._transforms = fixed, dict[tuple[str, str], Transform]()
        self._buffer: Any = None
        if fixed is None:
            try:
                from tf2_ros import Buffer, TransformListener
            except ImportError:
                raise ConfigError(
                    f"tf2_ros is not installed, so the parameter {parameter} must say where the sensor is."
                ) from None
            self._buffer = Buffer()
            self._listener = TransformListener(self._buffer, node)

    def between(self, source: str, target: str) -> Transform | None:
        """From one frame into another, once known for good; None as long as tf2 does not know it."""
        if self._fixed is not None:
            return self._fixed
        if source == target:
            return IDENTITY
        if (source, target) not in self._transforms and self._buffer.can_transform(target, source, Time()):
            message = self._buffer.lookup_transform(target, source, Time())
            self._transforms[source, target] = Transform.of_message(message.transform)
        return self._transforms.get((source, target))


class RangeSensor:
    """The last ranges of a topic: points of what is known of an image."""

    topic = "anchors"

    def __init__(self, kind: type, frames: Frames, max_age: float) -> None:
        self.kind, self._frames, self._max_age = kind, frames, max_age
        self._messages: deque[Any] = deque(maxlen=KEPT)

    def take(self, message: Any) -> None:
        """A subscription's callback."""
        self._messages.append(message)

    def add(self, context: ImageContext, header: Any) -> ImageContext:
        """With the points nearest in time to an image's header, or with why there are none."""
        stamp = nanoseconds(header)
        near = min(list(self._messages), key=lambda message: abs(nanoseconds(message.header) - stamp), default=None)
        if near is None or abs(nanoseconds(near.header) - stamp) > self._max_age * 1e9:
            what = "have come" if near is None else f"lie within {self._max_age:g} s of the image"
            return context.without(f"no ranges {what}")
        into = self._frames.between(near.header.frame_id, header.frame_id)
        if into is None:
            return context.without(_unknown(near.header.frame_id, header.frame_id))
        try:
            return context._replace(points=into(read_points(near)))
        except ImageError as error:
            return context.without(str(error))


class ImuSensor:
    """The gravity that an IMU's topic measures: up of what is known of an image."""

    topic, kind = "imu", Imu

    def __init__(self, frames: Frames) -> None:
        self._frames, self._gravity = frames, Gravity()

    def take(self, message: Any) -> None:
        """A subscription's callback."""
        self._gravity.take(message)

    def add(self, context: ImageContext, header: Any) -> ImageContext:
        """With the direction at an image's header, or with why there is none."""
        up = self._gravity.up(nanoseconds(header) / 1e9)
        if up is None:
            return context.without(self._gravity.problem)
        into = self._frames.between(self._gravity.frame, header.frame_id)
        if into is None:
            return context.without(_unknown(self._gravity.frame, header.frame_id))
        return context._replace(up=rotated(up, into))


def _unknown(source: str, target: str) -> str:
    return f"tf2 does not know how {source!r} lies to {target!r}"
