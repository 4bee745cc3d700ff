"""The examples of docs/metres.md run as their first lines say, on a rendered room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from densegeo.training.render import view
from tests.support.project import ROOT

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("metres_range_finder", ["--pixel", "128", "150", "--metres", "2.5"], "give or take"),
        ("metres_camera_height", ["--height", "1.4"], "metric"),
        ("metres_nothing", ["--output", "out"], "points.ply"),
    ],
)
def test_the_example_runs(tmp_path: Path, script: str, options: list[str], words: str) -> None:
    Image.fromarray(view(0, "test", 0, 256, 192).rgb).save(tmp_path / "photo.png")
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "photo.png", "--fov", "75", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
