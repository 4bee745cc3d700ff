"""`densegeo infer` told of the camera: a shape without metres, and its lens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from densegeo.training.render import view
from tests.support.command_line import run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "room.png"
    Image.fromarray(view(0, "test", 0, 256, 192).rgb).save(path)
    return path


def test_points_of_a_field_of_view(photo: Path, tmp_path: Path) -> None:
    assert run("infer", "fe2e-tiny", photo, "-o", tmp_path / "out", "-f", "ply", "--fov", "75", "--drop-flying") == 0
    (points,) = (tmp_path / "out").rglob("*.ply")
    header = points.read_bytes().split(b"end_header")[0].decode()
    assert "comment units unknown" in header
    count = int(header.split("element vertex ")[1].split()[0])
    assert 0.5 * 256 * 192 < count < 256 * 192  # without those in the air


def test_points_of_a_calibrated_lens(photo: Path, tmp_path: Path) -> None:
    lens = {
        "image_width": 512,
        "image_height": 384,
        "camera_matrix": {"data": [330, 0, 255.5, 0, 330, 191.5, 0, 0, 1]},
        "distortion_model": "plumb_bob",
        "distortion_coefficients": {"data": [-0.1, 0.02, 0, 0, 0]},
        "projection_matrix": {"data": [330, 0, 255.5, 0, 0, 330, 191.5, 0, 0, 0, 1, 0]},
    }
    (tmp_path / "lens.json").write_text(json.dumps(lens))
    arguments = ("infer", "fe2e-tiny", photo, "-o", tmp_path / "out", "-f", "ply", "--camera", tmp_path / "lens.json")
    assert run(*arguments, "--near", "1", "--far", "9") == 0
    (points,) = (tmp_path / "out").rglob("*.ply")
    assert b"comment units metres" in points.read_bytes()[:800]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fov", "75", "--fx", "1", "--fy", "1", "--cx", "1", "--cy", "1"], "once"),
        (["--fov", "190"], "180"),
        (["--camera", "nowhere.yaml"], "nowhere.yaml"),
        (["--fov", "75", "-f", "png16"], "metres"),
        (["-f", "ply", "--near", "1", "--far", "9"], "--fov"),
    ],
)
def test_wrong_cameras_are_refused_first(
    photo: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("infer", "fe2e-tiny", photo, *options) == 2
    assert words in capsys.readouterr().err
