"""The demo: a bundle and photographs that come with densegeo, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo import demo
from densegeo.cli import main
from densegeo.errors import BundleError
from densegeo.runtime.ready import find_bundle

HEAVY = ("torch", "triton", "onnx", "diffusers", "transformers", "viser", "safetensors")


def test_it_writes_pictures_and_says_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = demo.run(find_bundle("fe2e-tiny"), tmp_path / "demo", "onnxruntime", "cpu")
    assert {path.stem for path in demo.photographs()} == {"hall", "square", "warehouse"}
    assert all(file.stat().st_size > 100 for file in files)
    assert {file.name for file in files} == {file.name for file in (tmp_path / "demo").iterdir()}
    with Image.open(tmp_path / "demo" / "side_by_side.png") as picture:
        assert picture.size == (3 * 512, 3 * 384)
    for stem in ("hall", "square", "warehouse"):
        prediction, normals = (np.load(tmp_path / "demo" / f"{stem}_{kind}.npy") for kind in ("prediction", "normals"))
        near, far = prediction[-40:].mean(), prediction[130:230, 150:350].mean()
        assert near < far - 0.2  # the floor at the camera's feet, and what is in the middle
        assert normals[-40:, 200:300, 1].mean() < -0.5  # the floor faces up: y points down
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("side_by_side.png", "denoiser", "onnxruntime on cpu", "trained on synthetic scenes alone"):
        assert text in shown
    assert "Poly Haven" in (tmp_path / "demo" / "ATTRIBUTION.txt").read_text()


@pytest.mark.thorough
def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, densegeo.cli\n"
        "try: densegeo.cli.main(['demo', '--backend', 'onnxruntime'])\n"
        f"except SystemExit as end: print(end.code, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert (tmp_path / "out" / "demo" / "side_by_side.png").is_file()


def test_missing_photographs_and_a_wrong_bundle_are_typed_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo", str(tmp_path / "nothing"), "-o", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "is not a densegeo bundle" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(demo, "PHOTOGRAPHS", tmp_path)
    with pytest.raises(BundleError, match="install densegeo again"):
        demo.run(find_bundle("fe2e-tiny"), tmp_path / "out")
