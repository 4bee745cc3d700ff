"""The demo around a toy bundle: what it writes and says. The real build is covered by the export tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from densegeo import demo
from densegeo.errors import ImageError
from tests.toy_bundle import write_toy_bundle


def test_demo_writes_pictures_and_says_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")

    def build(path: Path, console: Console) -> Path:
        return write_toy_bundle(path)

    files = demo.run(build, tmp_path / "bundle", tmp_path / "demo")
    for file in files:
        assert file.is_file()
    with Image.open(tmp_path / "demo" / "side_by_side.png") as picture, Image.open(demo.photograph()) as photo:
        assert picture.width > 2 * photo.width
    shown = capsys.readouterr().out
    for text in ("side_by_side.png", "transformer", "danielbuechele, CC BY 2.0", "random weights"):
        assert text in shown


def test_a_missing_photo_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match="pip install scikit-learn"):
        demo.photograph()
