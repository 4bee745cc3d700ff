"""`densegeo infer`: every exit code of docs/infer.md, each from a run of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo.runtime import Estimator
from densegeo.runtime.backends import has_cuda_driver
from tests.support.command_line import run
from tests.support.infer import put, summary

pytestmark = pytest.mark.integration


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return folder


def broken_image(photos: Path, bundle: Path) -> list[object]:
    (photos / "2.png").write_bytes(b"no image")
    return [bundle, photos]


def damaged_bundle(photos: Path, bundle: Path) -> list[object]:
    copy = photos.parent / "copy"
    shutil.copytree(bundle, copy)
    (copy / "encoder_64x48.onnx").write_bytes(b"")
    return [copy, photos]


def other_schema(photos: Path, bundle: Path) -> list[object]:
    copy = photos.parent / "copy"
    copy.mkdir()
    (copy / "manifest.json").write_text('{"schema_version": 1}')
    return [copy, photos]


def done_already(photos: Path, bundle: Path) -> list[object]:
    assert run("infer", bundle, photos, "-o", photos.parent / "out", "-q") == 0
    return [bundle, photos]


# what the run is given -> (code, words on standard error)
ENDINGS: dict[str, tuple[Callable[[Path, Path], list[object]], int, str]] = {
    "done": (lambda photos, bundle: [bundle, photos], 0, "2 of 2 images done"),
    "some failed": (broken_image, 1, "2 of 3 images done"),
    "a bundle that is damaged": (damaged_bundle, 1, "encoder_64x48.onnx"),
    "a bundle of another version": (other_schema, 1, "schema version 1"),
    "a backend that cannot run here": (lambda photos, bundle: [bundle, photos, "--device", "cuda:7"], 1, "error:"),
    "no bundle": (lambda photos, bundle: ["nobundle", photos], 2, "nobundle is not a densegeo bundle"),
    "a folder that is no bundle": (lambda photos, bundle: [photos, photos], 2, "it has no manifest.json"),
    "a wrong option": (lambda photos, bundle: [bundle, photos, "--value-range", "9", "1"], 2, "smaller one first"),
    "an option without its format": (
        lambda photos, bundle: [bundle, photos, "--drop-flying", "-f", "npz", "--near", 1, "--far", 4],
        2,
        "is about ply or glb",
    ),
    "half an option": (lambda photos, bundle: [bundle, photos, "--value-range", "9"], 2, "unable to parse"),
    "nothing to work on": (lambda photos, bundle: [bundle, photos / "none*"], 2, "matches no image"),
    "results that are there": (done_already, 2, "2 of 2 results are in"),
    "a range for films": (lambda photos, bundle: [bundle, "a.mp4", "--value-range", 0, 9], 2, "no image"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_codes(ending: str, toy_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, code, words = ENDINGS[ending]
    arguments = given(photos, toy_bundle)
    capsys.readouterr()
    out = photos.parent / "out"
    before = sorted(out.rglob("*"))
    assert run("infer", *arguments, "-o", out) == code
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in error
    assert ("images done" in error) == ending.startswith(("done", "some failed"))  # a summary only of what was begun
    if code == 2:
        assert sorted(out.rglob("*")) == before  # nothing was run


@pytest.mark.skipif(has_cuda_driver(), reason="there is a driver")
def test_a_gpu_that_is_not_here(toy_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says so, and advises nothing about engines that the bundle does not have."""
    assert run("infer", toy_bundle, photos, "-o", photos.parent / "out", "--device", "cuda") == 1
    error = capsys.readouterr().err
    assert "no NVIDIA driver is here" in error
    assert 'Use the device "cpu"' in error
    assert "tensorrt" not in error


def test_a_failure_names_its_source_once(toy_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = photos / "broken.png"
    broken.write_bytes(b"no image")
    assert run("infer", toy_bundle, photos, "-o", photos.parent / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed")]
    assert line.startswith(f"failed {broken} is not an image")
    assert line.count(str(broken)) == 1


def test_a_name_too_long_for_its_results_is_refused_before_the_networks_run(
    toy_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in photos.iterdir():
        path.unlink()
    put(photos / f"{'n' * 246}.png")

    def run_networks(*_: object, **__: object) -> None:
        raise AssertionError("the networks ran")

    monkeypatch.setattr(Estimator, "__call__", run_networks)
    assert run("infer", toy_bundle, photos, "-o", photos.parent / "out", "--json") == 1
    (failure,) = summary(capsys)["failed"]
    assert re.search(r"is too long, \d+ bytes of 255.*shorter name", failure["error"])


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_terminal_that_goes_away(toy_bundle: Path, photos: Path) -> None:
    """Ctrl-C and SIGTERM: tests/test_infer.py."""
    for number in range(2, 300):
        os.link(photos / "1.png", photos / f"{number}.png")
    out = photos.parent / "out"
    command = [sys.executable, "-m", "densegeo", "infer", str(toy_bundle), str(photos), "-o", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 90
        while not list(out.glob("*_geometry.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 129, errors
    assert "stopped by SIGHUP" in errors
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("command", ["demo", "engines", "bag"])
def test_no_command_takes_what_is_no_bundle(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others: tests/test_cli.py."""
    assert run(command, tmp_path / "none") == 2
    assert "is not a densegeo bundle" in " ".join(capsys.readouterr().err.replace("│", " ").split())
