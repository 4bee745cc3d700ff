"""Frames, points and files of a result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo.errors import ConfigError, NotMetricError, ResourceError
from densegeo.outputs import FRAMES
from densegeo.runtime.colormap import table
from densegeo.runtime.geometry import Geometry

HEIGHT, WIDTH = 12, 20
K = np.array([[50.0, 0, 9.5], [0, 40.0, 5.5], [0, 0, 1]])


@pytest.fixture
def result() -> Geometry:
    random = np.random.default_rng(0)
    normals = random.standard_normal((HEIGHT, WIDTH, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    prediction = random.random((HEIGHT, WIDTH), dtype=np.float32)
    valid = np.ones((HEIGHT, WIDTH), bool)
    valid[2, 3] = False
    return Geometry(prediction, "log_affine", normals, valid, (WIDTH, HEIGHT), {"total": 1.5}, "fake")


@pytest.fixture
def metric(result: Geometry) -> Geometry:
    return result.to_metric(scale=2.0, shift=0.5)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("opencv", (0.1, 0.2, -0.9)),
        ("ros_optical", (0.1, 0.2, -0.9)),
        ("opengl", (0.1, -0.2, 0.9)),
        ("marigold", (0.1, -0.2, 0.9)),
        ("dsine", (-0.1, -0.2, 0.9)),
        ("ros_body", (-0.9, -0.1, -0.2)),
    ],
)
def test_frames(frame: str, expected: tuple[float, ...]) -> None:
    normals = np.array([[[0.1, 0.2, -0.9]]], np.float32)
    one = Geometry(np.ones((1, 1), np.float32), "metric", normals, np.ones((1, 1), bool), (1, 1))
    np.testing.assert_allclose(one.normals_in(frame)[0, 0], expected)


@pytest.mark.parametrize("frame", FRAMES)
def test_frames_are_right_handed_or_the_networks(frame: str) -> None:
    determinant = round(np.linalg.det(np.array(FRAMES[frame])))
    assert determinant == (-1 if frame == "dsine" else 1)  # (left, up, back) is left-handed


def test_unknown_frame_and_no_normals(result: Geometry) -> None:
    with pytest.raises(ConfigError, match="ros_body"):
        result.normals_in("nwu")
    none = Geometry(result.prediction, "affine", None, result.valid, (WIDTH, HEIGHT))
    assert none.normals_in("opengl") is None


@pytest.mark.parametrize("intrinsics", [K, (50.0, 40.0, 9.5, 5.5)])
def test_points_project_back_to_their_pixels(metric: Geometry, intrinsics: object) -> None:
    points = metric.points(intrinsics)
    assert points.dtype == np.float32
    assert points.shape == (HEIGHT, WIDTH, 3)
    assert np.isnan(points[2, 3]).all()
    v, u = np.nonzero(metric.valid)
    projected = points[metric.valid] @ K.T
    np.testing.assert_allclose(projected[:, :2] / projected[:, 2:], np.stack([u, v], 1), atol=1e-4)
    np.testing.assert_array_equal(points[..., 2], metric.depth)


@pytest.mark.parametrize(
    "intrinsics",
    [None, "abc", (1, 2, 3), np.eye(4), (0, 40, 9, 5), (50, -40, 9, 5), (np.nan, 40, 9, 5), K + np.eye(3)[[1, 0, 2]]],
)
def test_bad_intrinsics(metric: Geometry, intrinsics: object) -> None:
    with pytest.raises(ConfigError, match="ntrinsics"):
        metric.points(intrinsics)


def test_metres_are_refused_without_calibration(result: Geometry, tmp_path: Path) -> None:
    with pytest.raises(NotMetricError, match="to_metric"):
        result.points(K)
    for kind in ("png16", "ply"):
        with pytest.raises(NotMetricError, match="to_metric"):
            result.save(tmp_path / "out", ["npy", kind], intrinsics=K)
    assert not (tmp_path / "out").exists()  # checked before anything is written


def test_npy(result: Geometry, metric: Geometry, tmp_path: Path) -> None:
    paths = result.save(tmp_path, ["npy"])
    assert [path.name for path in paths] == ["prediction.npy", "valid.npy", "normals.npy", "geometry.json"]
    np.testing.assert_array_equal(np.load(tmp_path / "prediction.npy"), result.prediction)
    np.testing.assert_array_equal(np.load(tmp_path / "normals.npy"), result.normals)
    sidecar = json.loads((tmp_path / "geometry.json").read_text())
    assert sidecar["depth_kind"] == "log_affine"
    assert "not metric" in sidecar["depth_units"]
    assert sidecar["calibration"] is None
    metric.save(tmp_path, ["npy"], stem="a")
    np.testing.assert_array_equal(np.load(tmp_path / "a_depth.npy"), metric.depth)
    sidecar = json.loads((tmp_path / "a_geometry.json").read_text())
    assert sidecar["depth_units"] == "metres"
    assert sidecar["source_size"] == [WIDTH, HEIGHT]
    assert sidecar["calibration"]["scale"] == 2.0
    assert sidecar["calibration"]["residual"] is None
    assert "opencv" in sidecar["normals_frame"]


def test_png16_is_millimetres(metric: Geometry, tmp_path: Path) -> None:
    (path,) = metric.save(tmp_path, ["png16"])
    with Image.open(path) as image:
        values = np.asarray(image)
        assert "millimetres" in image.text["densegeo.depth_units"]
        assert image.text["densegeo.depth_kind"] == "metric"
    assert path.read_bytes()[24:26] == b"\x10\x00"  # 16 bits, greyscale
    assert values[2, 3] == 0
    np.testing.assert_allclose(values[metric.valid] / 1000, metric.depth[metric.valid], atol=0.00051)
    far = Geometry(np.array([[65.535, 65.6, 500.0]], np.float32), "metric", None, np.ones((1, 3), bool), (3, 1))
    (path,) = far.save(tmp_path / "far", ["png16"])
    np.testing.assert_array_equal(np.asarray(Image.open(path)), [[65535, 0, 0]])  # never wrapped around


def test_colour_pngs(result: Geometry, tmp_path: Path) -> None:
    depth, normals = result.save(tmp_path, ["png"])
    with Image.open(depth) as image:
        assert image.size == (WIDTH, HEIGHT)
        assert image.text["densegeo.depth_kind"] == "log_affine"
    with Image.open(normals) as image:
        assert "opengl" in image.text["densegeo.normals_frame"]
        back = np.asarray(image).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(back, result.normals_in("opengl"), atol=1 / 127)


def test_ply(metric: Geometry, tmp_path: Path) -> None:
    (path,) = metric.save(tmp_path, ["ply"], intrinsics=K)
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode().splitlines()
    count = int(metric.valid.sum())
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert f"element vertex {count}" in lines
    assert "comment units metres" in lines
    assert [line.split()[-1] for line in lines if line.startswith("property")] == ["x", "y", "z", "nx", "ny", "nz"]
    vertices = np.frombuffer(body, "<f4").reshape(count, 6)
    np.testing.assert_array_equal(vertices[:, :3], metric.points(K)[metric.valid])
    np.testing.assert_array_equal(vertices[:, 3:], metric.normals[metric.valid])


def test_ply_needs_intrinsics(metric: Geometry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="intrinsics"):
        metric.save(tmp_path, ["ply"])


def test_exr_without_its_extra(metric: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "OpenEXR", None)  # makes the import fail
    with pytest.raises(ConfigError, match=r"\.\[exr\]"):
        metric.save(tmp_path / "out", ["npy", "exr"])
    assert not (tmp_path / "out").exists()


def test_unknown_format_and_stem(result: Geometry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="png16"):
        result.save(tmp_path, ["jpg"])
    with pytest.raises(ConfigError, match="stem"):
        result.save(tmp_path, stem="../up")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output(result: Geometry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written"):
        result.save(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FULL = """
import resource, sys
import numpy as np
from densegeo.errors import ResourceError
from densegeo.runtime.geometry import Geometry
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # writes beyond fail, as on a full disk
flat = np.random.default_rng(0).random((100, 100), dtype=np.float32)
one = Geometry(flat, "metric", np.dstack([flat] * 3), flat >= 0, (100, 100))
try:
    one.save(sys.argv[1], [sys.argv[2]], intrinsics=(1, 1, 0, 0))
except ResourceError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["npy", "png", "ply", "exr"])
def test_a_full_disk_leaves_nothing(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    if kind == "exr":
        pytest.importorskip("OpenEXR")
    for existing in (True, False):
        target = tmp_path / str(existing)
        if existing:
            target.mkdir()
        command = [sys.executable, "-c", FULL, str(target), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "cannot be written" in done.stdout
        assert target.exists() == existing
        assert not existing or list(target.iterdir()) == []


def test_ctrl_c_leaves_nothing(result: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupt(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments, **options)

    original: Callable[..., None] = np.save
    monkeypatch.setattr(np, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "deep" / "out", ["npy"])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_earlier_files(
    result: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path, ["npy"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(ResourceError, match="No space left"):
        result.to_metric(scale=1, shift=0).save(tmp_path, ["npy"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_visualize(result: Geometry) -> None:
    source = np.zeros((HEIGHT + 4, WIDTH, 3), np.uint8)
    tall = Geometry(
        np.resize(result.prediction, (HEIGHT + 4, WIDTH)), "affine", None, np.ones((16, WIDTH), bool), (WIDTH, 16)
    )
    assert tall.visualize().size == (WIDTH, 16)
    assert tall.visualize(source).size == (2 * WIDTH, 16)
    assert result.visualize().size == (2 * WIDTH, HEIGHT)
    with pytest.raises(ConfigError, match="width, height"):
        result.visualize(source)


@pytest.mark.parametrize(("kind", "nearest"), [("log_affine", 0), ("metric", 0), ("disparity_affine", -1)])
def test_near_is_warm_and_far_is_cool(kind: str, nearest: int) -> None:
    ramp = np.tile(np.linspace(0.1, 1, 64, dtype=np.float32), (4, 1))
    picture = np.asarray(Geometry(ramp, kind, None, np.ones((4, 64), bool), (64, 4)).visualize()).astype(int)
    near, far = picture[0, nearest], picture[0, -1 - nearest]
    assert near[0] > near[2]
    assert far[2] > far[0]


def test_the_colour_map_darkens_steadily() -> None:
    linear = (table() / 255.0) ** 2.2
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()
    assert np.abs(np.diff(table().astype(int), axis=0)).max() <= 6  # no visible bands


def test_nothing_valid_is_still_a_picture(result: Geometry) -> None:
    empty = Geometry(result.prediction, "affine", None, np.zeros((HEIGHT, WIDTH), bool), (WIDTH, HEIGHT))
    assert len(np.unique(np.asarray(empty.visualize()))) == 1
