"""What tests of `densegeo infer` on folders share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from densegeo.records import JOURNAL

SAVED = {
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".mpo": "MPO",
    ".dib": "BMP",
    ".hif": "HEIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
}


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def put(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ImageFile.MAXBLOCK = 1 << 20
    picture(seed).save(path, SAVED.get(path.suffix.lower()))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def put_photos(folder: Path) -> Path:
    """Two branches with equal names, hidden files, and files that are no images."""
    for index, name in enumerate(("a.png", "b.jpg", "deep/a.png", "deep/c.webp", "other/deep/a.PNG")):
        put(folder / name, index)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7")
    put(folder / ".thumbnails" / "a.png")
    return folder
