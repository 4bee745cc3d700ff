"""Point clouds, scans and ranges; transforms; gravity."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("rosbags")

from densegeo.errors import ConfigError, ImageError
from densegeo.ros.ranges import Transform, read_points
from tests.support.ros import T, cloud, header

POINTS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


@pytest.mark.parametrize("big", [False, True])
def test_clouds(big: bool) -> None:
    given = POINTS.copy()
    given[7, 1] = np.nan
    np.testing.assert_array_equal(read_points(cloud(given, big=big)), np.delete(given, 7, axis=0))


def test_organised_clouds_with_padded_rows() -> None:
    message = cloud(POINTS)
    rows = message.data.reshape(5, -1)
    message.height, message.width, message.row_step = 5, 10, rows.shape[1] + 3
    message.data = np.pad(rows, ((0, 0), (0, 3))).reshape(-1)
    np.testing.assert_array_equal(read_points(message), POINTS)
    message.data = message.data[:-40]
    with pytest.raises(ImageError, match="5 rows of 10 points"):
        read_points(message)


def test_clouds_without_a_place() -> None:
    message = cloud(POINTS)
    message.fields = message.fields[:3]
    with pytest.raises(ImageError, match="no field z; it has intensity, x, y"):
        read_points(message)
    assert read_points(cloud(POINTS[:0])).shape == (0, 3)


def test_scans() -> None:
    scan = T["sensor_msgs/msg/LaserScan"](
        header=header(),
        angle_min=-math.pi / 2,
        angle_max=math.pi / 2,
        angle_increment=math.pi / 4,
        time_increment=0.0,
        scan_time=0.0,
        range_min=0.5,
        range_max=10.0,
        ranges=np.array([1, 0.1, 2, np.inf, 10], np.float32),  # too near, no echo, and at the most: nothing was hit
        intensities=np.empty(0, np.float32),
    )
    np.testing.assert_allclose(read_points(scan), [[0, -1, 0], [2, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(("reading", "points"), [(3.0, 1), (9.0, 0), (0.1, 0), (math.inf, 0), (math.nan, 0)])
def test_ranges(reading: float, points: int) -> None:
    kind = T["sensor_msgs/msg/Range"]
    fields = {"radiation_type": 1, "field_of_view": 0.1, "min_range": 0.2, "max_range": 9.0, "variance": 0.0}
    known = {name: value for name, value in fields.items() if name in kind.__dataclass_fields__}
    actual = read_points(kind(header=header(), range=reading, **known))
    assert actual.tolist() == [[3.0, 0.0, 0.0]] * points


def test_anything_else_is_refused() -> None:
    with pytest.raises(ImageError, match="PointCloud2, LaserScan or Range, not as"):
        read_points(header())


def test_transforms() -> None:
    half = math.sqrt(0.5)
    # a lidar (x forward, y left, z up) 0.2 m above a camera (x right, y down, z forward)
    mounted = Transform.of([0, -0.2, 0, 0.5, -0.5, 0.5, 0.5])
    np.testing.assert_allclose(mounted(np.array([[5.0, 1.0, 0.5]])), [[-1, -0.7, 5]], atol=1e-12)
    turned = Transform.of([1, 2, 3, 0, 0, half, half])
    both = mounted.then(turned)
    np.testing.assert_allclose(both(POINTS.astype(float)), turned(mounted(POINTS.astype(float))), atol=1e-12)
    np.testing.assert_allclose(both.then(both.inverse())(POINTS.astype(float)), POINTS, atol=1e-6)
    for wrong, says in (([0.0] * 7, "length 0"), ([0.0] * 6, "seven numbers"), ([math.nan] + [0.0] * 5 + [1], "seven")):
        with pytest.raises(ConfigError, match=says):
            Transform.of(wrong)
