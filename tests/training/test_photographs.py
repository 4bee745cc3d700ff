"""The demo's photographs: what a view of a panorama shows, and that the shipped files are these views."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from densegeo import demo
from densegeo.errors import ImageError
from densegeo.training import photographs
from densegeo.training.photographs import SIZE, VIEWS, View, look, photograph


def test_a_view_of_a_panorama_sees_what_lies_that_way() -> None:
    rows, columns = 90, 180  # two degrees a pixel
    longitude, latitude = np.meshgrid(np.arange(columns), np.arange(rows))
    panorama = np.stack([longitude, latitude, np.zeros_like(longitude)], axis=-1).astype(np.uint8)
    view = View("", "", yaw=30, pitch=20, field_of_view=90)
    seen = look(panorama, view, (101, 75))
    assert seen[37, 50, :2] == pytest.approx([(30 + 180) / 2 - 0.5, (90 - 20) / 2 - 0.5], abs=1)
    level = look(panorama, View("", "", yaw=30, pitch=0, field_of_view=90), (101, 75))
    assert level[37, [0, 100], 0] == pytest.approx([(30 - 45 + 180) / 2 - 0.5, (30 + 45 + 180) / 2 - 0.5], abs=1.5)


def test_the_shipped_files_are_these_views() -> None:
    assert [path.stem for path in demo.photographs()] == sorted(view.stem for view in VIEWS)
    assert sum(path.stat().st_size for path in demo.photographs()) < 200_000
    for view in VIEWS:
        with Image.open(demo.PHOTOGRAPHS / f"{view.stem}.jpg") as shipped:
            assert shipped.size == SIZE
            gap = np.abs(np.asarray(shipped).astype(int) - np.asarray(photograph(view)))
        assert gap.mean() < 2  # of 255: what JPEG loses


def test_missing_panoramas_are_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match="pip install viser"):
        photographs.panoramas()
