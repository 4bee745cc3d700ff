"""The bundle that comes with the package: made from today's weights, found by its name, and reproduced here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo import Estimator
from densegeo.cli import main
from densegeo.errors import BundleError
from densegeo.runtime import ready
from densegeo.runtime.bundle import SCHEMA_VERSION, check_files, read_manifest, sha256_file
from tests.support.golden import ROOT

WEIGHTS = ROOT / "models" / "weights"
NAME = "fe2e-tiny"


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in a folder that has no bundle."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_was_made_from_todays_sources() -> None:
    """When this fails, run `make ready-bundle` and commit what it wrote."""
    assert ready.names() == [NAME]
    directory = ready.find_bundle(NAME)
    manifest = read_manifest(directory)
    assert manifest.schema_version == SCHEMA_VERSION
    assert (manifest.model, manifest.precision) == (NAME, "fp32")
    check_files(directory, manifest)
    assert {path.name for path in directory.iterdir()} == {*manifest.files, "manifest.json"}
    assert {source.role for source in manifest.sources} == {"dit", "vae", "prompt"}
    for source in manifest.sources:
        path = WEIGHTS / NAME / source.path.partition(": ")[2]
        assert source.sha256 == sha256_file(path), f"{path} changed since the bundle was made"


@pytest.mark.thorough
def test_commands_take_its_name(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", NAME, "--backend", "onnxruntime") == 0
    assert "the numbers come out right" in capsys.readouterr().out
    assert command("inspect", NAME) == 0
    assert "PyTorch float32, rewrites off" in capsys.readouterr().out
    image = elsewhere / "grey.png"
    Image.new("RGB", (64, 48), (90, 120, 150)).save(image)
    assert command("infer", NAME, str(image), "-o", "results", "--backend", "onnxruntime") == 0
    assert np.load(elsewhere / "results" / "grey_normals.npy").shape == (48, 64, 3)


def test_a_folder_of_its_name_wins(elsewhere: Path) -> None:
    with Estimator(NAME, "onnxruntime", "cpu") as estimator:
        assert estimator.manifest.model == NAME
    (elsewhere / NAME).mkdir()
    assert ready.find_bundle(NAME) == Path(NAME)
    with pytest.raises(BundleError, match="a folder that has nothing of that name"):
        Estimator(NAME, "onnxruntime", "cpu")


@pytest.mark.parametrize("name", ["fe2e-tinny", "./fe2e-tiny", "", ".", "..", "fe2e-tiny/manifest.json"])
def test_other_names_are_paths(name: str) -> None:
    assert ready.find_bundle(name) == Path(name)
    with pytest.raises(BundleError, match="is not a densegeo bundle"):
        Estimator(name, "onnxruntime", "cpu")


def test_nothing_is_written_into_the_installation(elsewhere: Path) -> None:
    assert ready.beside(ready.find_bundle(NAME), "calibration") == Path(f"{NAME}.calibration")
    assert ready.beside(elsewhere / "mine", "calibration") == elsewhere / "mine.calibration"
