"""Cameras: every way of giving intrinsics, and rays that a lens images where it should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from densegeo.errors import CalibrationWarning, ConfigError
from densegeo.runtime.camera import Camera
from densegeo.runtime.geometry import Geometry
from densegeo.size import Size

K = np.array([[410.0, 0, 321.5], [0, 405.0, 238.25], [0, 0, 1]])
CALIBRATION = """\
image_width: 640
image_height: 480
camera_name: left
camera_matrix:
  rows: 3
  cols: 3
  data: [410.0, 0.0, 321.5, 0.0, 405.0, 238.25, 0.0, 0.0, 1.0]
distortion_model: plumb_bob
distortion_coefficients:
  rows: 1
  cols: 5
  data: [-0.28, 0.09, 0.0012, -0.0007, -0.012]
rectification_matrix:
  rows: 3
  cols: 3
  data: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
projection_matrix:
  rows: 3
  cols: 4
  data: [355.0, 0.0, 318.0, -42.6, 0.0, 370.0, 240.0, 0.0, 0.0, 0.0, 1.0, 0.0]
"""


def message(**changes: object) -> SimpleNamespace:
    """A ROS 2 CameraInfo as rclpy gives it."""
    values: dict[str, object] = {
        "width": 640,
        "height": 480,
        "distortion_model": "plumb_bob",
        "d": [-0.28, 0.09, 0.0012, -0.0007, -0.012],
        "k": K.ravel(),
        "r": np.eye(3).ravel(),
        "p": np.array([355.0, 0, 318, -42.6, 0, 370, 240, 0, 0, 0, 1, 0]),
        "binning_x": 0,
        "binning_y": 0,
        "roi": SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0, do_rectify=False),
    }
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize(
    "intrinsics",
    [
        (410.0, 405.0, 321.5, 238.25),
        K,
        K.ravel().tolist(),
        np.hstack([K, [[-50.0], [0], [0]]]),
        np.hstack([K, np.zeros((3, 1))]).ravel(),
        Camera(410.0, 405.0, 321.5, 238.25),
        message(d=[]),
        {"K": K.ravel(), "P": np.zeros(12), "D": [0.0] * 5, "width": 640, "height": 480},
    ],
)
def test_every_spelling_is_the_same_camera(intrinsics: object) -> None:
    camera = Camera.of(intrinsics)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (410, 405, 321.5, 238.25)
    assert not any(camera.distortion)


def test_camera_info_from_yaml_and_json(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "left.yaml").write_text(CALIBRATION)
    raw, rectified = (Camera.read(tmp_path / "left.yaml", rectified) for rectified in (False, True))
    assert raw == Camera(410, 405, 321.5, 238.25, Size(640, 480), "plumb_bob", (-0.28, 0.09, 0.0012, -0.0007, -0.012))
    assert rectified == Camera(355, 370, 318, 240, Size(640, 480))
    assert Camera.of(message()) == raw

    (tmp_path / "left.json").write_text(json.dumps(msgspec.yaml.decode(CALIBRATION)))
    assert Camera.read(tmp_path / "left.json") == raw


def test_binning_and_region_of_interest_are_applied_as_image_geometry_does() -> None:
    roi = SimpleNamespace(x_offset=100, y_offset=40, width=400, height=300, do_rectify=False)
    camera = Camera.of(message(binning_x=2, binning_y=2, roi=roi))
    assert (camera.fx, camera.fy) == (205, 202.5)
    assert (camera.cx, camera.cy) == (110.75, 99.125)
    assert camera.size == Size(200, 150)


def test_intrinsics_follow_a_resized_picture_and_refuse_a_cropped_one() -> None:
    camera = Camera(400, 400, 319.5, 239.5, Size(640, 480))
    half = camera.at(Size(320, 240))
    assert (half.fx, half.cx, half.cy) == (200, 159.5, 119.5)
    # the ray through a picture's corner is the same whatever its size
    np.testing.assert_allclose(half.rays_at([[-0.5, -0.5]]), camera.rays_at([[-0.5, -0.5]]))
    with pytest.raises(ConfigError, match="640x480, this one is 640x360"):
        camera.at(Size(640, 360))
    assert Camera(400, 400, 319.5, 239.5).at(Size(640, 360)).fx == 400  # of unknown size: this image's


@pytest.mark.parametrize(("axis", "extent"), [("x", 640), ("y", 480), ("diagonal", 800)])
def test_field_of_view(axis: str, extent: float) -> None:
    camera = Camera.from_fov(90, (640, 480), axis)  # type: ignore[arg-type]
    assert camera.fx == camera.fy == pytest.approx(extent / 2)
    left, right = camera.rays_at([[-0.5, 239.5], [639.5, 239.5]])
    if axis == "x":
        assert math.degrees(math.atan2(right[0], 1) - math.atan2(left[0], 1)) == pytest.approx(90)


LENSES = [
    ("plumb_bob", (-0.28, 0.09, 0.0012, -0.0007, -0.012)),
    ("plumb_bob", (0.15, -0.1, 0.0, 0.002)),
    ("rational_polynomial", (4.4, 1.2, -0.0004, 0.0002, 0.08, 4.8, 2.1, 0.31)),
    ("equidistant", (-0.012, 0.008, -0.006, 0.0011)),
    ("equidistant", ()),
]


@pytest.mark.parametrize(("lens", "coefficients"), LENSES)
def test_rays_are_undistorted(lens: str, coefficients: tuple[float, ...]) -> None:
    camera = Camera(410, 405, 321.5, 238.25, Size(640, 480), lens, coefficients)  # type: ignore[arg-type]
    rays = camera.rays(Size(640, 480))
    assert rays.dtype == np.float32
    assert rays.shape == (480, 640, 3)
    assert np.isfinite(rays).all()
    rows, columns = np.mgrid[0:480:7, 0:640:7]
    back = camera.project(rays[rows, columns].reshape(-1, 3))
    np.testing.assert_allclose(back, np.stack([columns.ravel(), rows.ravel()], 1), atol=2e-3)
    straight = Camera(410, 405, 321.5, 238.25).rays(Size(640, 480))
    assert np.abs(rays - straight).max() > 0.01  # the distortion is no small thing here


def test_plumb_bob_is_the_formula_of_opencv() -> None:
    k1, k2, p1, p2, k3 = -0.28, 0.09, 0.0012, -0.0007, -0.012
    x, y = 0.31, -0.22
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    expected = (
        410 * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + 321.5,
        405 * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + 238.25,
    )
    camera = Camera(410, 405, 321.5, 238.25, None, "plumb_bob", (k1, k2, p1, p2, k3))
    np.testing.assert_allclose(camera.project([[2 * x, 2 * y, 2]])[0], expected)


def test_pixels_without_a_ray_in_front_are_nan() -> None:
    fisheye = Camera(120, 120, 319.5, 239.5, Size(640, 480), "equidistant", (0, 0, 0, 0))
    rays = fisheye.rays(Size(640, 480))
    radius = np.hypot(*np.meshgrid(np.arange(640) - 319.5, np.arange(480) - 239.5)) / 120  # the angle
    assert np.isnan(rays[radius > math.pi / 2]).all()
    assert np.isfinite(rays[radius < 1.5]).all()
    folding = Camera(300, 300, 319.5, 239.5, Size(640, 480), "plumb_bob", (-0.5, 0, 0, 0))  # r (1 - r2 / 2) turns back
    corner = folding.rays(Size(640, 480))[0, 0]
    assert np.isnan(corner).all()
    assert np.isnan(fisheye.project([[0, 0, -1.0]])).all()


def flat(width: int = 64, height: int = 48) -> Geometry:
    depth = np.full((height, width), 2.0, np.float32)
    return Geometry(depth, "metric", None, np.ones((height, width), bool), Size(width, height))


def test_points_use_the_lens_and_follow_the_size() -> None:
    camera = Camera(410, 405, 321.5, 238.25, Size(640, 480), "plumb_bob", (-0.28, 0.09, 0.0, 0.0))
    points = flat().points(camera)
    np.testing.assert_allclose(points[..., :2], 2 * camera.at(Size(64, 48)).rays(Size(64, 48))[..., :2])


@pytest.mark.parametrize(
    ("intrinsics", "why"),
    [
        ((0.8, 0.8, 0.5, 0.5), "normalised"),
        ((3000, 3000, 2000, 1500), "4001x3001"),
        ((50, 50, -12, 20), "outside"),
        ((50, 400, 32, 24), "factor of two"),
        ((3000, 3000, 32, 24), "field of view of 1 degrees"),
        ((2, 2, 32, 24), "field of view of 173 degrees"),
    ],
)
def test_intrinsics_of_another_image_are_doubted(intrinsics: tuple[float, ...], why: str) -> None:
    with pytest.warns(CalibrationWarning, match=why):
        flat().points(intrinsics)


@pytest.mark.parametrize("intrinsics", [(50, 50, 31.5, 23.5), (60, 45, 20, 30), (200, 200, 31.5, 23.5)])
def test_plausible_intrinsics_are_not(intrinsics: tuple[float, ...], recwarn: pytest.WarningsRecorder) -> None:
    flat().points(intrinsics)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Camera.of(message(k=np.zeros(9))), "uncalibrated"),
        (lambda: Camera.of(message(distortion_model="thin_prism")), "thin_prism"),
        (lambda: Camera.of(message(d=[0.1, 0.2, 0.3])), "coefficients"),
        (lambda: Camera.of(message(k=["a"] * 9)), "numbers"),
        (lambda: Camera.of({"image_width": 640}), "camera_matrix"),
        (lambda: Camera.of(np.eye(4)), "3x4"),
        (lambda: Camera.from_fov(180, (640, 480)), "degrees"),
        (lambda: Camera.from_fov(90, (640, 480), "z"), "axis"),  # type: ignore[arg-type]
        (lambda: Camera(1, 1, 0, 0, None, "fov", (1.0,)), "distortion model"),  # type: ignore[arg-type]
        (lambda: Camera.read("nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_refusals(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]


def test_a_file_that_is_no_calibration(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="camera_matrix"):
        Camera.read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ConfigError, match="neither"):
        Camera.read(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_height", "tall"), ("image_width", "-640"), ("binning_y", "[2]"), ("x_offset", "1.5"), ("width", "true")],
)
def test_a_camera_file_with_a_bad_count_names_file_and_key(key: str, value: str, tmp_path: Path) -> None:
    fields = {"camera_matrix": "{data: [400, 0, 320, 0, 400, 240, 0, 0, 1]}", key: value}
    if key == "x_offset":
        fields["roi"] = f"{{{key}: {fields.pop(key)}}}"
    file = tmp_path / "camera.yaml"
    file.write_text("".join(f"{name}: {text}\n" for name, text in fields.items()))
    with pytest.raises(ConfigError, match=rf"camera\.yaml .*{key} must be a whole number"):
        Camera.read(file)


def test_any_pair_is_a_size() -> None:
    for pair in ((128, 96), [128, 96], np.array([128, 96])):
        camera = Camera(200.0, 200.0, 64.0, 48.0, size=pair)  # type: ignore[arg-type]
        assert camera.size == Size(128, 96)
        assert camera.at((64, 48)).fx == 100
