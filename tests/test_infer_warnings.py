"""`densegeo infer`: how images are read on request, and what is warned of: named, counted, recorded, silent with -q."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from densegeo.records import JOURNAL
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import FileDigest, read_manifest, sha256_file, write_manifest
from tests.support.command_line import run

pytestmark = pytest.mark.integration
WHITE = 2**14 - 1


def journal(folder: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (folder / JOURNAL).read_text().splitlines())
    return {line["name"]: line for line in lines}


def said(text: str) -> str:
    """Without the widths and colours of a terminal."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three grey files of 14 bits in 16, and one that uses all of its 8."""
    folder = tmp_path / "raw"
    folder.mkdir()
    y, x = np.mgrid[0:48, 0:64]
    for index in range(3):
        values = (x + y + index) / 113 * WHITE
        Image.fromarray(values.astype(np.uint16)).save(folder / f"{index}.png")
    Image.fromarray(((x + y) * 2).astype(np.uint8)).save(folder / "bright.png")
    return folder


def test_a_range_for_all_images(toy_bundle: Path, raw: Path, tmp_path: Path) -> None:
    (raw / "bright.png").unlink()
    arguments = ("infer", toy_bundle, raw, "-f", "npy", "-q", "-o", tmp_path / "out")
    assert run(*arguments, "--value-range", 0, WHITE) == 0
    with Estimator(toy_bundle) as estimator:
        for index in range(3):
            expected = estimator(raw / f"{index}.png", value_range=(0, WHITE)).prediction
            np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{index}_prediction.npy"), expected)
            assert np.ptp(expected) > 0.3  # and not nearly black
    assert run(*arguments, "--value-range", 0, WHITE, "--skip-existing") == 0
    assert run(*arguments, "--value-range", 0, 4095, "--skip-existing") == 2  # results with another option
    assert run(*arguments, "--skip-existing") == 2


def test_warnings_name_their_images_and_are_counted(
    toy_bundle: Path, raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("infer", toy_bundle, raw, "-f", "npy", "-o", tmp_path / "out", "--workers", 1, "--json") == 0
    captured = capfd.readouterr()
    shown = said(captured.err)
    assert shown.count("uses 14 of its 16 bits") == 2  # as it comes, and in the summary
    assert f"warning {raw}/0.png: An image uses 14 of its 16 bits" in shown
    assert f"warning 3 times, first of {raw}/0.png: An image uses 14" in shown
    assert "levels.py" not in shown  # the place in the code says nothing to a user
    (told,) = json.loads(captured.out)["warnings"]
    assert "say --value-range 0 16383" in told["warning"]
    assert "value_range" not in captured.err
    assert (told["first"], told["count"]) == (f"{raw}/0.png", 3)
    lines = journal(tmp_path / "out")
    assert "say --value-range 0 16383" in lines["2"]["warnings"][0]
    assert "warnings" not in lines["bright"]
    for name, count in (("2", 1), ("bright", 0)):
        record = json.loads((tmp_path / "out" / f"{name}_geometry.json").read_text())
        assert len(record["source"]["warnings"]) == count


def test_quiet_keeps_warnings_in_the_records(
    toy_bundle: Path, raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of three kinds, and from three places: the image, the camera, the log."""
    out = tmp_path / "out"
    camera = ("--fx", 900, "--fy", 900, "--cx", 1024, "--cy", 768)  # of a larger image
    options = ("-f", "png16,ply", "--scale", 1, "--shift", 4.5, *camera)
    assert run("infer", toy_bundle, raw, "-o", out, "-q", *options) == 0
    assert capfd.readouterr() == ("", "")
    dark, bright = (journal(out)[name]["warnings"] for name in ("0", "bright"))
    assert [any(words in text for text in dark) for words in ("16 bits", "intrinsics", "65.535 m")] == [True] * 3
    assert len(dark) == 3
    assert len(bright) == 2
    for name, texts in (("0", dark), ("bright", bright)):  # also what was warned of while other files were written
        assert json.loads((out / f"{name}_geometry.json").read_text())["source"]["warnings"] == texts


def test_jpegs_without_their_end(toy_bundle: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "JPEG", quality=90)
    cut = tmp_path / "in" / "cut.jpg"
    cut.parent.mkdir()
    cut.write_bytes(data.getvalue()[: data.tell() * 2 // 3])
    arguments = ("infer", toy_bundle, cut.parent, "-f", "npy", "-q", "-o", tmp_path / "out")
    assert run(*arguments) == 1
    assert run(*arguments, "--truncated") == 0
    with Estimator(toy_bundle, truncated=True) as estimator:
        np.testing.assert_array_equal(np.load(tmp_path / "out" / "cut_prediction.npy"), estimator(cut).prediction)


def test_images_darker_than_the_range_that_was_said(
    toy_bundle: Path, raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """8 bits among files of 16, with a range for these."""
    arguments = ("infer", toy_bundle, raw, "-f", "json", "-o", tmp_path / "out", "--value-range", 0, WHITE)
    assert run(*arguments) == 0
    assert f"warning {raw}/bright.png: An image has no value above" in said(capfd.readouterr().err)


def test_a_jpeg_without_its_end_gets_an_option(
    toy_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:-900])
    assert run("infer", toy_bundle, tmp_path / "cut.jpg", "-o", tmp_path / "out") == 1
    assert "with --truncated" in said(capfd.readouterr().err)
    assert "with --truncated" in journal(tmp_path / "out")["cut"]["error"]
    assert run("infer", toy_bundle, tmp_path / "cut.jpg", "-o", tmp_path / "out", "--truncated") == 0


def test_a_result_without_one_valid_pixel_is_warned_of(
    toy_bundle: Path, raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Networks that give NaN all over."""
    bundle = shutil.copytree(toy_bundle, tmp_path / "nan")
    (path,) = bundle.glob("denoiser*.onnx")
    model = onnx.load(path)
    (half,) = (tensor for tensor in model.graph.initializer if tensor.name == "half")
    half.CopyFrom(numpy_helper.from_array(np.float32("nan"), half.name))
    model.graph.node[-1].input[0] = "halved"
    onnx.save(model, path)
    manifest = read_manifest(bundle)
    changed = {path.name: FileDigest(path.stat().st_size, sha256_file(path))}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=manifest.files | changed))
    assert run("infer", bundle, raw / "bright.png", "-f", "npy", "-o", tmp_path / "out") == 0
    assert "warning" in (text := said(capfd.readouterr().err))
    assert f"{raw}/bright.png: Not one pixel of the result is valid" in text
    assert "Not one pixel" in journal(tmp_path / "out")["bright"]["warnings"][0]
