"""Which way is up: a sensor_msgs/Imu's acceleration, averaged over time while its gyroscope says how it turns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_AVERAGED = 1.0  # seconds over which accelerations are averaged: a robot's own come and go
_GAP = 0.5  # seconds without a message after which the average begins anew
_LEAST = 5.0  # m/s^2; an IMU at rest measures 9.8, upwards, unless gravity was taken out
_LATE = 1.0  # seconds that the newest message may lie before or behind an image


class Gravity:
    """Feed it an IMU's messages in order. problem: why there is no `up`, or ""."""

    def __init__(self) -> None:
        self.frame = ""
        self.problem = "no message of the IMU has come"
        self._mean: Float64 | None = None  # m/s^2, in the IMU's frame
        self._time = -math.inf

    def take(self, message: Any) -> None:
        """A sensor_msgs/Imu; one without accelerations (covariance -1 at its head) or gravity is left out."""
        acceleration = np.array([getattr(message.linear_acceleration, axis) for axis in "xyz"], dtype=np.float64)
        length = float(np.linalg.norm(acceleration))
        if message.linear_acceleration_covariance[0] == -1 or not math.isfinite(length):
            self.problem = "the IMU measures no acceleration"
            return
        if length < _LEAST:
            self.problem = (
                f"the IMU's acceleration is {length:.2g} m/s^2, without gravity: take its raw topic, in m/s^2 (REP 145)"
            )
            return
        stamp = message.header.stamp.sec + message.header.stamp.nanosec / 1e9
        elapsed = stamp - self._time
        if self._mean is None or not 0 <= elapsed < _GAP or message.header.frame_id != self.frame:
            self._mean = acceleration
        else:
            share = 1 - math.exp(-elapsed / _AVERAGED)
            self._mean = (1 - share) * self._rotated(self._mean, message, elapsed) + share * acceleration
        self.frame, self._time, self.problem = message.header.frame_id, stamp, ""

    def up(self, seconds: float) -> Float64 | None:
        """(3,) unit vector against gravity in the IMU's frame, for an image of that stamp; None where it is unknown."""
        if self._mean is None:
            return None
        if abs(seconds - self._time) > _LATE:
            self.problem = f"the IMU's last message lies {abs(seconds - self._time):.3g} s from the image"
            return None
        length = float(np.linalg.norm(self._mean))
        return self._mean / length if length > 0 else None

    @staticmethod
    def _rotated(vector: Float64, message: Any, seconds: float) -> Float64:
        """What stands still in the world turns against the IMU: dv/dt = v x w."""
        rate = np.array([getattr(message.angular_velocity, axis) for axis in "xyz"], dtype=np.float64)
        if message.angular_velocity_covariance[0] == -1 or not np.isfinite(rate).all():
            return vector
        return vector + seconds * np.cross(vector, rate)
