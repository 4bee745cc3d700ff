"""What else measures: ranges for anchors, in the camera's frame."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from rclpy.time import Time
from sensor_msgs.msg import LaserScan, PointCloud2, Range

from densegeo.errors import ConfigError
from densegeo.ros.ranges import IDENTITY, Transform, read_points
from densegeo_ros.convert import nanoseconds

RANGE_SENSORS = {cls.__name__: cls for cls in (PointCloud2, LaserScan, Range)}
KEPT = 20  # messages of a sensor


class Frames:
    """Transforms between frames: one that a parameter gave, or tf2's.

    Raises ConfigError where none is given and tf2_ros is not installed.
    """

    def __init__(self, node: LifecycleNode, given: Transform | None, parameter: str) -> None:
        self._given, self._found = given, dict[tuple[str, str], Transform]()
        self._buffer: Any = None
        if given is None:
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
        if self._given is not None:
            return self._given
        if source == target:
            return IDENTITY
        if (source, target) not in self._found and self._buffer.can_transform(target, source, Time()):
            message = self._buffer.lookup_transform(target, source, Time())
            self._found[source, target] = Transform.of_message(message.transform)
        return self._found.get((source, target))


class Sensor:
    """The last messages of one topic, and the frame they are in."""

    def __init__(self, frames: Frames, max_age: float) -> None:
        self._frames, self._max_age = frames, max_age
        self._messages: deque[Any] = deque(maxlen=KEPT)

    def take(self, message: Any) -> None:
        """A subscription's callback."""
        self._messages.append(message)

    def nearest(self, stamp: int) -> Any:
        """The message nearest in time to a stamp in nanoseconds, or None where all are too old or too new."""
        near = min(list(self._messages), key=lambda one: abs(nanoseconds(one.header) - stamp), default=None)
        if near is None or abs(nanoseconds(near.header) - stamp) > self._max_age * 1e9:
            return None
        return near

    def points(self, stamp: int, frame: str) -> NDArray[np.float64] | None:
        """Points (N, 3) in metres in the camera's frame, or None where there is nothing to be had."""
        message = self.nearest(stamp)
        transform = message and self._frames.between(message.header.frame_id, frame)
        return None if transform is None else transform(read_points(message))
