"""The command line on a toy bundle: commands, exit codes, bad input, name collisions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from densegeo import cli
from densegeo.errors import ImageError
from densegeo.inputs import find_images, unique_stems
from densegeo.runtime.bundle import MANIFEST, read_manifest
from densegeo.runtime.measured import Measured, advice, remember
from tests.support.toy_bundle import make_toy_bundle


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Path:
    return toy_bundle


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return make_toy_bundle(tmp_path / "bundle", references=1.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/c.webp"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    code = stop.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def run_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "densegeo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = "import sys; from densegeo import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'onnxruntime', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("build", "infer", "inspect", "verify", "bench", "compare", "doctor"):
        assert f" {command} " in result.stdout
    assert result.stdout.strip().endswith("set()")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("densegeo 0.")


def test_unknown_command_is_a_usage_error() -> None:
    assert run("fly") == 2


def test_infer_folder_with_equal_names(bundle: Path, photos: Path, tmp_path: Path) -> None:
    assert run("infer", bundle, photos, "--output", tmp_path / "out", "--format", "npy,png") == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    for stem in ("photos_a", "deep_a", "b", "c"):
        assert any(name.startswith(stem) and name.endswith(".npy") for name in written), written
        assert any(name.startswith(stem) and name.endswith(".png") for name in written), written


def test_infer_goes_on_after_a_broken_image(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:50])
    (photos / "empty.jpg").write_bytes(b"")
    assert run("infer", bundle, photos, "-o", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert "4 of 6 images done" in errors
    assert "broken.png" in errors
    assert "empty.jpg" in errors
    assert any((tmp_path / "out").glob("c*.npy"))


def test_infer_in_metres_with_points(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("infer", bundle, photos / "b.jpg", "-o", out, "--format", "png16,ply", "--near", 1, "--far", 20)
    assert run(*arguments, "--fx", 50, "--fy", 50, "--cx", 30, "--cy", 20) == 0
    assert list(out.glob("b*.ply"))
    assert list(out.glob("b*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file-*.png"], "matches no image"),
        (["{photos}", "--near", "1"], "go together"),
        (["{photos}", "--fx", "1"], "go together"),
        (["{photos}", "--near", "1", "--far", "2", "--scale", "1", "--shift", "0"], "not both"),
        (["{photos}", "--format", "gif"], "gif"),
        (["{photos}", "--format", "png16"], "Calibrate"),
        (["{photos}", "--fit", "squash"], "stretch"),
        (["{photos}", "--backend", "abacus"], "abacus"),
        (["{photos}", "--device", "toaster"], "toaster"),
    ],
)
def test_infer_errors_are_one_line(
    bundle: Path, photos: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.replace("{photos}", str(photos)) for argument in arguments]
    assert run("infer", bundle, *filled, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:")
    assert message in error


def test_infer_into_a_file_is_an_error(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("in the way")
    assert run("infer", bundle, photos, "-o", tmp_path / "out") == 1
    assert "Cannot write" in capsys.readouterr().err


def test_inspect(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", bundle) == 0
    shown = capsys.readouterr().out
    for text in ("toy", "fp32", "64x48", "encoder", "denoiser", "decoder", "log_affine"):
        assert text in shown
    assert run("inspect", bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "toy"


def test_verify_accepts_then_refuses(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", copy) == 0
    assert "verified" in capsys.readouterr().out
    graph = copy / "encoder_64x48.onnx"
    raw = bytearray(graph.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    graph.write_bytes(raw)
    assert run("verify", copy) == 1
    assert "corrupted" in capsys.readouterr().err


def test_wrong_numbers_fail_verify_and_get_no_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", references=1.01)
    assert run("verify", bundle) == 1
    assert "exceeds" in capsys.readouterr().out
    assert run("bench", bundle, "--runs", 2) == 1
    captured = capsys.readouterr()
    assert "No speed is reported" in captured.err
    assert "p50" not in captured.out


def test_bench_ends_with_json(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", bundle, "--runs", 3, "--json", tmp_path / "deep" / "x.json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "deep" / "x.json").read_text())
    assert result["bucket"] == "64x48"
    assert set(result["cold_ms"]) == {"import", "open", "first"}
    for stage in ("encoder", "denoiser", "decoder", "total"):
        spread = result["stages"][stage]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
    assert result["stages"]["encoder"]["gflops"] > 0
    assert result["stages"]["prepare"]["gflops"] is None
    assert set(result["images_per_second"]) == {"1", "2", "4"}
    assert all(speed > 0 for speed in result["images_per_second"].values())
    assert result["batched_per_second"] == {}  # the bundle has no graphs for several images
    assert result["ceiling_gflops"] > result["stages"]["encoder"]["gflops"]


def test_bench_is_remembered(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what follows from two of them, with the precisions that the manifests say."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run("bench", bundle, "--runs", 3) == 0
    (path,) = (tmp_path / "densegeo" / "measured").iterdir()
    first = msgspec.json.decode(path.read_bytes(), type=Measured)
    assert (first.model, first.what, first.bucket, first.backend) == ("toy", "fp32", "64x48", "onnxruntime")
    assert 0 < first.p50 <= first.p90
    manifest = read_manifest(bundle)
    assert advice(manifest) == []
    remember(msgspec.structs.replace(first, what="fp8 with attention", p50=first.p50 / 2, p90=first.p90 / 2))
    (line,) = advice(manifest)
    assert line.startswith(f"fp8 with attention is recommended at 64x48 on {first.device} (onnxruntime): ")
    assert f"took {first.p50 / 2:.3g} ms, fp32 {first.p50:.3g} ms" in line
    assert run("bench", bundle, "--runs", 3) == 0  # in place of the first
    assert len(list((tmp_path / "densegeo" / "measured").iterdir())) == 2


def test_compare_puts_benchmarks_side_by_side(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", bundle, "--runs", 2, "--json", tmp_path / "one.json") == 0
    slow = json.loads((tmp_path / "one.json").read_text())
    for stage in slow["stages"].values():
        stage["p50"] *= 2
    (tmp_path / "slow.json").write_text(json.dumps(slow | {"device": "cuda:0"}))
    capsys.readouterr()
    assert run("compare", tmp_path / "one.json", tmp_path / "slow.json", "--plot", tmp_path / "deep" / "plot.png") == 0
    shown = capsys.readouterr().out
    assert "cuda:0" in shown
    (ratios,) = (line.replace("│", " ").split()[-2:] for line in shown.splitlines() if "times the first" in line)
    assert ratios == ["1.00", "0.50"]
    with Image.open(tmp_path / "deep" / "plot.png") as picture:
        assert picture.width > 500


def test_compare_refuses_what_is_no_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for name, words in (("x.json", "no file of `densegeo bench"), ("y.json", "Cannot read")):
        assert run("compare", tmp_path / name) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify", "bench"])
def test_no_bundle(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, tmp_path) == 1
    assert "not a densegeo bundle" in capsys.readouterr().err


def test_unknown_schema_version(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((copy / MANIFEST).read_text()) | {"schema_version": 99}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert run("inspect", copy) == 1
    assert "schema version 99" in capsys.readouterr().err


def test_missing_graph(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / read_manifest(copy).buckets[0].decoder.file).unlink()
    assert run("verify", copy) == 1
    assert "decoder_64x48.onnx" in capsys.readouterr().err


def test_errors_show_no_traceback(tmp_path: Path) -> None:
    result = run_process("inspect", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error:")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["build", "calibrate"])
def test_missing_extra_is_explained(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_torch(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "import_module", without_torch)
    assert run(command, "--help") == 1
    assert 'pip install "densegeo[export]"' in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_exits_130(bundle: Path, photos: Path, tmp_path: Path) -> None:
    image = photos / "b.jpg"
    for number in range(3000):
        os.link(image, photos / f"{number}.jpg")
    command = [sys.executable, "-m", "densegeo", "infer", str(bundle), str(photos), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not any((tmp_path / "out").glob("*.npy")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    assert "onnxruntime" in capsys.readouterr().out
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu_count"] >= 1
    assert report["gpu_note"]
    backends = {backend["name"].partition(" ")[0]: backend for backend in report["backends"]}
    assert {"onnxruntime", "openvino", "tensorrt", "torch"} <= set(backends)
    assert backends["tensorrt"]["usable"] != "yes"  # never executed on a GPU


def test_find_images(photos: Path) -> None:
    names = [path.relative_to(photos).as_posix() for path in find_images([str(photos)])]
    assert names == ["a.png", "b.jpg", "deep/a.png", "deep/c.webp"]
    assert len(find_images([str(photos / "*.png"), str(photos / "a.png")])) == 1
    assert len(find_images([str(photos / "**" / "*.png")])) == 2
    assert find_images([str(photos / "notes.txt")])  # named outright: the image reader judges it
    odd = photos / "x[1].png"
    (photos / "a.png").rename(odd)
    assert find_images([str(odd)]) == [odd]
    with pytest.raises(ImageError, match="nothing"):
        find_images([str(photos), "nothing-*"])


def test_unique_stems() -> None:
    paths = [
        Path(p) for p in ("/x/one/a.png", "/x/two/a.png", "/x/two/A.jpg", "/y/two/a.jpg", "/z/b.png", "/z/two_a.png")
    ]
    stems = unique_stems(paths)
    assert len({stem.lower() for stem in stems}) == len(paths)
    assert stems[0] == "one_a"
    assert stems[4:] == ["b", "two_a"]
    assert unique_stems([Path("/a.png"), Path("/a.jpg")]) == ["a_2", "a_3"]
