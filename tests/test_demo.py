"""The demo around a toy bundle: what it writes and says. The real build is covered by the export tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from densegeo import demo
from densegeo.errors import ImageError
from tests.support.toy_bundle import make_toy_bundle


def test_demo_writes_pictures_and_says_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(path: Path, console: Console) -> Path:
        return make_toy_bundle(path)

    files = demo.run(build, tmp_path / "bundle", tmp_path / "demo")
    for file in files:
        assert file.is_file()
    width, height = demo.SIZE
    with Image.open(tmp_path / "demo" / "side_by_side.png") as picture:
        assert picture.width > 2 * width
        assert picture.height >= len(demo.PHOTOS) * height
    shown = capsys.readouterr().out
    for text in ("side_by_side.png", "denoiser", "Poly Haven", "CC0", "random weights"):
        assert text in shown


def test_a_view_of_a_panorama_sees_what_lies_that_way() -> None:
    rows, columns = 90, 180  # two degrees a pixel
    longitude, latitude = np.meshgrid(np.arange(columns), np.arange(rows))
    panorama = np.stack([longitude, latitude, np.zeros_like(longitude)], axis=-1).astype(np.uint8)
    photo = demo.Photo("", "", yaw=30, pitch=20, field_of_view=90)
    seen = demo.look(panorama, photo, (101, 75))
    assert seen[37, 50, :2] == pytest.approx([(30 + 180) / 2 - 0.5, (90 - 20) / 2 - 0.5], abs=1)
    level = demo.look(panorama, demo.Photo("", "", yaw=30, pitch=0, field_of_view=90), (101, 75))
    assert level[37, [0, 100], 0] == pytest.approx([(30 - 45 + 180) / 2 - 0.5, (30 + 45 + 180) / 2 - 0.5], abs=1.5)


def test_missing_photos_are_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match="pip install viser"):
        demo.panoramas()
