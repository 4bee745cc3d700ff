"""Which way is up, from an IMU's messages."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("rosbags")

from densegeo.ros.gravity import Gravity
from tests.support.ros import imu

UP = np.array([0.3, -0.2, 0.9]) / np.linalg.norm([0.3, -0.2, 0.9])


def test_a_walking_robot_is_averaged() -> None:
    """Steps of 2 m/s^2 twice a second: the direction stays within a degree and a half."""
    gravity, rng = Gravity(), np.random.default_rng(0)
    for number in range(400):
        at = 1 + number / 100
        step = 2.0 * np.sin(2 * np.pi * 2 * at) * np.array([1.0, 0.0, 0.0]) + rng.normal(0, 0.3, 3)
        gravity.take(imu((9.81 * UP + step).tolist(), at=at))
    actual = gravity.up(5.0)
    assert actual is not None
    assert np.degrees(np.arccos(actual @ UP)) < 1.5


def test_a_gyroscope_turns_the_average_with_the_robot() -> None:
    """A fast roll about x: without the gyroscope the average lags behind by many degrees."""
    errors = []
    for turning in ([1.0, 0.0, 0.0], None):
        gravity = Gravity()
        for number in range(101):
            angle = number / 100
            # up in a body that has rolled by `angle` about its x axis
            up = np.array([0.0, np.sin(angle), np.cos(angle)])
            gravity.take(imu((9.81 * up).tolist(), turning=turning, at=1 + angle))
        actual = gravity.up(2.0)
        assert actual is not None
        errors.append(np.degrees(np.arccos(np.clip(actual @ up, -1, 1))))
    assert errors[0] < 0.5
    assert errors[1] > 10


def test_why_there_is_none() -> None:
    gravity = Gravity()
    assert gravity.up(1.0) is None
    assert "no message" in gravity.problem
    gravity.take(imu([0.1, 0.0, 0.05]))
    assert gravity.up(1.5) is None
    assert "without gravity" in gravity.problem
    silent = imu([0.0, 0.0, 9.81])
    silent.linear_acceleration_covariance[0] = -1
    gravity.take(silent)
    assert "measures no acceleration" in gravity.problem
    gravity.take(imu([0.0, 0.0, 9.81], at=2.0))
    assert gravity.problem == ""
    np.testing.assert_allclose(gravity.up(2.5), [0, 0, 1])
    assert gravity.up(4.0) is None
    assert "2 s from the image" in gravity.problem


def test_a_pause_or_another_frame_begins_anew() -> None:
    gravity = Gravity()
    gravity.take(imu([0.0, 0.0, 9.81], at=1.0))
    gravity.take(imu([0.0, 9.81, 0.0], at=3.0))
    np.testing.assert_allclose(gravity.up(3.0), [0, 1, 0])
    gravity.take(imu([9.81, 0.0, 0.0], at=3.01, frame="other"))
    np.testing.assert_allclose(gravity.up(3.0), [1, 0, 0])
    assert gravity.frame == "other"
