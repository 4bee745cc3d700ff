"""Every format of a result, in memory and in files, read back by libraries that are not ours."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo.errors import ConfigError, MissingOutputError, NotMetricError, ResourceError
from densegeo.formats import RESULTS
from densegeo.outputs import FRAMES
from densegeo.runtime.encoders import ENCODERS
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.meshes import DEPTH_STEP, grid_faces

HEIGHT, WIDTH = 24, 32
K = (30.0, 28.0, 15.5, 11.5)


def made(kind: str = "log_affine", *, normals: bool = True) -> Geometry:
    """A slope with one invalid pixel."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    vectors = np.dstack([x / WIDTH - 0.5, y / HEIGHT - 0.5, np.full_like(x, -1)])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    valid = np.ones((HEIGHT, WIDTH), bool)
    valid[2, 3] = False
    prediction = (x + 2 * y) / (WIDTH + 2 * HEIGHT)
    return Geometry(prediction, kind, vectors if normals else None, valid, (WIDTH, HEIGHT), {"total": 1.5}, "fake")


@pytest.fixture
def relative() -> Geometry:
    return made()


@pytest.fixture
def metric() -> Geometry:
    return made().to_metric(scale=1.0, shift=0.5)


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_every_row_has_an_encoder() -> None:
    assert set(RESULTS) == set(ENCODERS)


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_and_files_are_the_same_bytes(
    metric: Geometry, photo: np.ndarray, name: str, dtype: str, tmp_path: Path
) -> None:
    if RESULTS[name].module:
        pytest.importorskip(RESULTS[name].module)
    options = {"intrinsics": K, "image": photo, "dtype": dtype, "source": {"path": "a.png"}}
    paths = metric.save(tmp_path, [name], stem="a", **options)
    assert paths
    for path in paths:
        file = path.name.removeprefix("a_")
        assert file in RESULTS[name].files
        assert metric.encode(name, file=file, **options) == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_one_file_needs_no_name_and_several_do(relative: Geometry) -> None:
    assert relative.encode("grey8")[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"depth_color\.png.*normals\.png"):
        relative.encode("png")
    assert made(normals=False).encode("png") == made(normals=False).encode("png", file="depth_color.png")
    with pytest.raises(ConfigError, match="there is depth_color"):
        made(normals=False).encode("png", file="normals.png")
    with pytest.raises(ConfigError, match="npz"):
        relative.encode("gif")
    with pytest.raises(ConfigError, match="float16"):
        relative.encode("npz", dtype="int8")


def test_npz(relative: Geometry, metric: Geometry) -> None:
    with np.load(io.BytesIO(relative.encode("npz"))) as arrays:  # without pickle
        assert set(arrays) == {"prediction", "valid", "normals", "geometry"}
        np.testing.assert_array_equal(arrays["normals"], relative.normals)
        assert json.loads(str(arrays["geometry"]))["depth_kind"] == "log_affine"
    with np.load(io.BytesIO(metric.encode("npz", dtype="float16"))) as arrays:
        assert {arrays[name].dtype.name for name in ("prediction", "depth", "normals")} == {"float16"}
        np.testing.assert_allclose(arrays["depth"], metric.depth, rtol=5e-4)


@pytest.mark.parametrize("kind", ["log_affine", "affine", "disparity_affine", "metric"])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_can_be_read_back(kind: str, bits: int) -> None:
    result = made("log_affine").to_metric(scale=2, shift=0) if kind == "metric" else made(kind)
    with Image.open(io.BytesIO(result.encode(f"grey{bits}"))) as image:
        text, values = image.text, np.asarray(image).astype(np.float64)
    assert values[2, 3] == 0
    assert (values[result.valid].min(), values[result.valid].max()) == (1, 2**bits - 1)
    far, near = float(text["densegeo.grey_far"]), float(text["densegeo.grey_near"])
    back = far + (values - 1) / (2**bits - 2) * (near - far)
    expected = np.log(result.depth) if kind == "metric" else result.prediction
    np.testing.assert_allclose(back[result.valid], expected[result.valid], atol=1.01 * abs(near - far) / 2**bits)
    assert (far < near) == (kind == "disparity_affine")
    nearest = (-1, -1) if kind == "disparity_affine" else (0, 0)
    assert values[nearest] == values.max()
    assert ("metres" in text["densegeo.grey_quantity"]) == (kind == "metric")


def test_millimetres_beyond_16_bits_are_said(metric: Geometry, caplog: pytest.LogCaptureFixture) -> None:
    values = metric.millimetres()
    assert values.dtype == np.uint16
    assert values[2, 3] == 0
    np.testing.assert_allclose(values[metric.valid] / 1000, metric.depth[metric.valid], atol=0.00051)
    assert not caplog.records
    far = Geometry(np.array([[3.0, 65.535, 65.6, 9e9]], np.float32), "metric", None, np.ones((1, 4), bool), (4, 1))
    with caplog.at_level(logging.WARNING, "densegeo"):
        np.testing.assert_array_equal(far.millimetres(), [[3000, 65535, 0, 0]])
    assert "50 % of the pixels lie beyond 65.535 m" in caplog.text


@pytest.mark.parametrize("call", ["millimetres", "png16", "ply", "glb"])
def test_what_needs_metres_says_so(relative: Geometry, call: str) -> None:
    with pytest.raises(NotMetricError, match="to_metric"):
        relative.millimetres() if call == "millimetres" else relative.encode(call, intrinsics=K)
    alone = Geometry(None, None, relative.normals, relative.valid, (WIDTH, HEIGHT))
    with pytest.raises(MissingOutputError):
        alone.millimetres() if call == "millimetres" else alone.encode(call, intrinsics=K)
    with pytest.raises(MissingOutputError):
        alone.encode("grey16")


@pytest.mark.parametrize("frame", FRAMES)
def test_points_in_a_frame(metric: Geometry, frame: str) -> None:
    points = metric.points_in(frame, K)
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, metric.points(K) @ np.array(FRAMES[frame], np.float32).T, rtol=1e-6)


def test_points_in_no_frame(metric: Geometry) -> None:
    with pytest.raises(ConfigError, match="ros_body"):
        metric.points_in("nwu", K)


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_points_have_the_image_s_colours(metric: Geometry, photo: np.ndarray, color: str) -> None:
    trimesh = pytest.importorskip("trimesh")
    given = photo[..., ::-1] if color == "bgr" else photo
    data = metric.encode("ply", intrinsics=K, image=given, color=color)
    cloud = trimesh.load(io.BytesIO(data), file_type="ply")
    np.testing.assert_array_equal(cloud.colors[:, :3], photo[metric.valid])
    np.testing.assert_allclose(cloud.vertices, metric.points(K)[metric.valid], rtol=1e-6)


def test_glb_is_a_textured_mesh(metric: Geometry, photo: np.ndarray) -> None:
    trimesh = pytest.importorskip("trimesh")
    scene = trimesh.load(io.BytesIO(metric.encode("glb", intrinsics=K, image=photo)), file_type="glb", process=False)
    (mesh,) = scene.geometry.values()
    expected = metric.points_in("opengl", K)[metric.valid]
    np.testing.assert_allclose(mesh.vertices, expected, rtol=1e-6)  # a slope without steps: every valid pixel
    assert len(mesh.faces) == 2 * ((HEIGHT - 1) * (WIDTH - 1) - 4)  # four squares touch the invalid pixel
    np.testing.assert_allclose(mesh.vertex_normals, metric.normals_in("opengl")[metric.valid], atol=1e-5)
    assert (mesh.face_normals[:, 2] > 0).all()  # the front faces the camera
    picture = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB"))
    assert picture.shape == photo.shape
    u, v = mesh.visual.uv.T
    np.testing.assert_allclose(u * WIDTH - 0.5, np.nonzero(metric.valid)[1], atol=1e-4)
    np.testing.assert_allclose((1 - v) * HEIGHT - 0.5, np.nonzero(metric.valid)[0], atol=1e-4)  # trimesh turns v over


def test_a_mesh_is_cut_at_depth_steps() -> None:
    depth = np.full((4, 6), 2.0, np.float32)
    depth[:, 3:] = 2.0 * DEPTH_STEP * 1.01
    assert len(grid_faces(depth)) == 2 * (3 * 5 - 3)
    depth[:, 3:] = 2.0 * DEPTH_STEP * 0.99
    assert len(grid_faces(depth)) == 2 * 3 * 5
    steep = np.array([[1.0, np.nan], [2.0, 1.0]], np.float32)
    flat = Geometry(steep, "metric", None, np.isfinite(steep), (2, 2))
    with pytest.raises(ConfigError, match="no surface"):
        flat.encode("glb", intrinsics=K)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_opencv_reads_exr(
    relative: Geometry, metric: Geometry, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exr = pytest.importorskip("OpenEXR")
    monkeypatch.setenv("OPENCV_IO_ENABLE_OPENEXR", "1")  # asked when it first reads such a file
    cv2 = pytest.importorskip("cv2")
    tolerance = {"float32": 0.0, "float16": 5e-4}[dtype]
    for result, names in ((relative, ("prediction", "normals")), (metric, ("depth", "normals"))):
        paths = result.save(tmp_path, ["exr"], dtype=dtype)
        assert [path.stem for path in paths] == list(names)
        for path, name in zip(paths, names, strict=True):
            read, expected = cv2.imread(str(path), cv2.IMREAD_UNCHANGED), getattr(result, name)
            read = read[..., ::-1] if name == "normals" else read
            np.testing.assert_allclose(read, expected, atol=tolerance, rtol=tolerance)
            with exr.File(str(path)) as file:
                assert file.header()["densegeo.depth_kind"] == result.depth_kind


def test_visualize_takes_bgr_and_a_span(relative: Geometry, metric: Geometry, photo: np.ndarray) -> None:
    shown = np.asarray(relative.visualize(photo[..., ::-1], color="bgr"))
    np.testing.assert_array_equal(shown[:, :WIDTH], photo)
    np.testing.assert_array_equal(shown, np.asarray(relative.visualize(photo)))
    low, high = (float(value) for value in (metric.depth[metric.valid].min(), metric.depth[metric.valid].max()))
    own = np.asarray(metric.visualize(span=(low, high))).astype(int)[:, :WIDTH]
    far = np.asarray(metric.visualize(span=(low, 50 * high))).astype(int)[:, :WIDTH]
    assert (far.sum(-1) >= own.sum(-1)).all()  # nearer within the wider span: lighter
    assert far[-1, -1].sum() > own[-1, -1].sum()
    for wrong in ((2.0, 1.0), (0.0, 3.0)):
        with pytest.raises(ConfigError, match="span"):
            metric.visualize(span=wrong)


def test_print_says_kind_size_and_range(relative: Geometry, metric: Geometry) -> None:
    for result, words in ((relative, ("log_affine", "0 to", "to_metric")), (metric, ("metric", "1.649 to", " m, "))):
        lines = str(result).splitlines()
        assert len(lines) == 3
        assert f"{WIDTH}x{HEIGHT}" in lines[0]
        assert all(word in lines[1] for word in words), lines
        assert "opencv" in lines[2]
    alone = Geometry(None, None, relative.normals, relative.valid, (WIDTH, HEIGHT))
    assert "none" in str(alone).splitlines()[1]
    assert "none" in str(made(normals=False)).splitlines()[2]
    assert "\n" not in repr(relative)


def test_what_was_there_is_there_again_when_not_all_can_be_put(relative: Geometry, tmp_path: Path) -> None:
    relative.save(tmp_path, ("npy", "json"), stem="a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "a_geometry.json").unlink()
    (tmp_path / "a_geometry.json").mkdir()  # the last that is put
    (tmp_path / "a_normals.npy").unlink()
    with pytest.raises(ResourceError, match=r"a_geometry.json is a folder\. Nothing of them was left"):
        made(kind="affine").save(tmp_path, ("npy", "json"), stem="a")
    (tmp_path / "a_geometry.json").rmdir()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == {name: data for name, data in before.items() if name not in ("a_geometry.json", "a_normals.npy")}
    with pytest.raises(ResourceError, match=r"too long.*shorter name"):
        relative.save(tmp_path / "new" / "folder", ("npz", "json"), stem="b" * 245)
    assert not (tmp_path / "new").exists()
    relative.save(tmp_path, ("npy", "json"), stem="a")
    assert {path.name for path in tmp_path.iterdir()} == set(before)  # no second names stay
