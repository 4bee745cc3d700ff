"""From what is known of an image to depth, and the sentence that says why it is metric or not."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("rosbags")

from densegeo.errors import CalibrationError
from densegeo.ros import outputs
from densegeo.ros.images import Picture
from densegeo.ros.metric import ImageContext, MetresOptions, calibrated, rotated, tracker_arguments, uncertainty
from densegeo.ros.ranges import Transform
from densegeo.runtime.camera import Camera
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.tracker import ScaleTracker
from densegeo.size import Size
from tests.support.ros import camera_info

SIZE = Size(128, 96)
CAMERA = Camera(110.0, 110.0, 63.5, 47.5, SIZE)
TILT, HEIGHT = 0.15, 1.4
UP = np.array([0.0, -np.cos(TILT), -np.sin(TILT)])


@pytest.fixture(scope="module")
def room() -> tuple[Geometry, np.ndarray]:
    """What an exact network would say of a floor and two walls, and their depth."""
    rays = CAMERA.rays(SIZE).astype(np.float64)
    planes = [(-UP, HEIGHT), (np.array([0, -np.sin(TILT), np.cos(TILT)]), 6.0), (np.array([-1.0, 0, 0]), 1.8)]
    with np.errstate(divide="ignore"):
        depths = np.stack([np.where(rays @ n > 1e-6, d / (rays @ n), np.inf) for n, d in planes])
    normals = -np.stack([n for n, _ in planes])[depths.argmin(axis=0)].astype(np.float32)
    depth = depths.min(axis=0)
    p = ((np.log(depth) + 0.3) / 2.2).astype(np.float32)
    return Geometry(p, "log_affine", normals, np.ones(p.shape, bool), SIZE, model="m"), depth


def run(geometry: Geometry, known: ImageContext, asked: MetresOptions) -> tuple[Geometry, str]:
    """As the node and bags do."""
    refusal = None
    said = tracker_arguments(known, asked)
    if said:
        try:
            geometry = ScaleTracker().update(geometry, **said)
        except CalibrationError as error:
            refusal = error
    return calibrated(geometry, refusal, known, asked)


@pytest.mark.parametrize(
    ("more", "asked", "source"),
    [
        ({"points": np.array([[0.2, 0.3, 0.0]])}, MetresOptions(), "anchor"),
        ({"up": UP}, MetresOptions(camera_height=HEIGHT), "the camera's height"),
        ({}, MetresOptions(camera_height=HEIGHT), "the camera's height"),
    ],
)
def test_one_fact_is_metres(room: tuple[Geometry, np.ndarray], more: Any, asked: MetresOptions, source: str) -> None:
    geometry, depth = room
    if "points" in more:  # what a range finder beside the axis measures
        u, v = 70, 60
        more = {"points": CAMERA.rays(SIZE)[v, u].astype(np.float64)[None] * depth[v, u]}
    actual, why = run(geometry, ImageContext(CAMERA)._replace(**more), asked)
    assert actual.depth_kind == "metric"
    np.testing.assert_allclose(actual.depth, depth, rtol=0.05)
    assert re.fullmatch(rf"metric, from normals and {source}, give or take [0-9.]+ %", why), why
    assert 0 < uncertainty(actual) < 0.6
    assert outputs.possible(actual, CAMERA) == {"normals", "depth", "points"}


def test_a_camera_alone_gives_a_shape_without_a_unit(room: tuple[Geometry, np.ndarray]) -> None:
    geometry, depth = room
    actual, why = run(geometry, ImageContext(CAMERA).without("no ranges have come"), MetresOptions())
    assert why.startswith("up to scale, from normals, its unit unknown")
    assert why.endswith(": no ranges have come")
    made = outputs.messages(
        actual, Picture(np.zeros((96, 128, 3), np.uint8), "rgb"), CAMERA, outputs.TOPICS, outputs.Options()
    )
    assert set(made) == {"depth_up_to_scale", "relative_depth", "normals"}
    shape = made["depth_up_to_scale"]["data"].view("<f4").reshape(96, 128)
    np.testing.assert_allclose(shape / np.median(shape), depth / np.median(depth), rtol=0.01)
    np.testing.assert_array_equal(made["relative_depth"]["data"].view("<f4").reshape(96, 128), geometry.prediction)


def test_near_and_far_are_used_where_nothing_measures(room: tuple[Geometry, np.ndarray]) -> None:
    actual, why = run(room[0], ImageContext().without("no camera_info has come"), MetresOptions(1.0, 6.0))
    assert actual.depth_kind == "metric"
    assert why == "metric, from near and far; no camera_info has come"
    assert np.isnan(uncertainty(actual))


def test_why_there_are_no_metres(room: tuple[Geometry, np.ndarray]) -> None:
    geometry, _ = room
    actual, why = run(geometry, ImageContext(), MetresOptions())
    assert why == "relative (log_affine): nothing measures it: set camera_height, anchors, or near and far"
    wall = Geometry(
        geometry.prediction, "log_affine", np.full_like(geometry.normals, (0, 0, -1)), geometry.valid, SIZE, model="m"
    )
    actual, why = run(wall, ImageContext(CAMERA), MetresOptions(camera_height=1.0))
    assert actual.depth_kind == "log_affine"
    assert why.startswith("relative (log_affine): "), why
    assert "ormals" in why or "scale" in why
    alone = Geometry(None, None, geometry.normals, geometry.valid, SIZE)
    assert calibrated(alone, None, ImageContext(), MetresOptions())[1] == "not there: the model has normals alone"


def test_a_camera_that_is_none_or_anothers_is_said_and_not_used() -> None:
    info = camera_info(128, 96)
    seen = ImageContext.of(info, False)
    assert seen.at(SIZE).camera == Camera.from_camera_info(info)
    half = seen.at((64, 48)).camera
    assert half is not None
    assert half.fx == 50.0
    known = seen.at((100, 20))
    assert known.camera is None
    assert "camera_info is of another picture" in known.lacking[0]
    assert tracker_arguments(known, MetresOptions(camera_height=1.0)) == {}
    assert ImageContext.of(None, False).at(SIZE).lacking == ("no camera_info has come",)
    info.k[0] = 0.0
    (why,) = ImageContext.of(info, False).at(SIZE).lacking
    assert why.startswith("camera_info cannot be used: ")


def test_points_beside_and_behind_are_no_anchors() -> None:
    points = np.array([[0, 0, 2.0], [9, 0, 2.0], [0, 0, -2.0]])
    uv, metres = tracker_arguments(ImageContext(CAMERA)._replace(points=points), MetresOptions())["anchors"]
    np.testing.assert_allclose(uv, [[63.5, 47.5]])
    np.testing.assert_array_equal(metres, [2.0])
    assert "anchors" not in tracker_arguments(ImageContext(CAMERA)._replace(points=points[1:]), MetresOptions())


def test_up_turns_with_its_sensor() -> None:
    body = Transform.of([1.0, 2.0, 3.0, 0.5, -0.5, 0.5, 0.5])  # x forward, y left, z up -> optical
    np.testing.assert_allclose(rotated(np.array([0.0, 0.0, 1.0]), body), [0, -1, 0], atol=1e-12)


def test_sizes_of_pictures() -> None:
    for color, shape in (("bgr", (48, 64, 3)), ("nv12", (72, 64)), ("yuyv", (48, 64, 2)), ("rgb", (48, 64))):
        assert Picture(np.zeros(shape, np.uint8), color).size == (64, 48)  # type: ignore[arg-type]
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (64, 48)).save(file, "JPEG", exif=exif)
    assert Picture(file.getvalue(), "rgb").size == (48, 64)
    assert Picture(b"nothing", "rgb").size is None
