"""The command line on a toy bundle: commands, exit codes, bad input. `infer` is in test_infer.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from PIL import Image

from densegeo import cli
from densegeo.doctor import EXTRAS, examine
from densegeo.extras import install_hint
from densegeo.runtime import verified
from densegeo.runtime.bundle import MANIFEST, read_manifest
from densegeo.runtime.measured import ENOUGH, Conditions, Measured, advice, remember
from densegeo.runtime.ready import find_bundle
from tests.support.command_line import run
from tests.support.toy_bundle import make_toy_bundle

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Path:
    return toy_bundle


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return make_toy_bundle(tmp_path / "bundle", references=1.0)


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


def test_bench_writes_json_when_asked(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", bundle, "--runs", 3, "--json", tmp_path / "deep" / "x.json") == 0
    assert "{" not in capsys.readouterr().out
    result = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert result["bucket"] == "64x48"
    assert set(result["cold_ms"]) == {"import", "open", "first"}
    for stage in ("encoder", "denoiser", "decoder", "total"):
        spread = result["stages"][stage]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
        assert spread["jitter"] > 0
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
    assert (first.model, first.precision, first.bucket, first.backend) == ("toy", "fp32", "64x48", "onnxruntime")
    assert 0 < first.p50 <= first.p90
    manifest = read_manifest(bundle)
    assert any("3 runs are few" in doubt for doubt in first.conditions.doubts)
    good = Conditions(runs=ENOUGH, variation=0.01)
    remember(msgspec.structs.replace(first, precision="fp8 with attention", p50=first.p50 / 2, p90=first.p90 / 2))
    assert advice(manifest) == []
    remember(msgspec.structs.replace(first, conditions=good))
    eight = msgspec.structs.replace(first, precision="fp8 with attention", p50=first.p50 / 2, p90=first.p90 / 2)
    remember(msgspec.structs.replace(eight, conditions=good))
    (line,) = advice(manifest)
    assert line.startswith(f"fp8 with attention is recommended at 64x48 on {first.device} (onnxruntime): ")
    assert run("bench", bundle, "--runs", 3) == 0  # does not take the place of what can be believed
    assert advice(manifest) == [line]
    assert len(list((tmp_path / "densegeo" / "measured").iterdir())) == 2


@pytest.fixture(scope="module")
def timed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run's JSON."""
    path = tmp_path_factory.mktemp("timed") / "one.json"
    assert run("bench", bundle, "--runs", 2, "--json", path) == 0
    actual: dict[str, Any] = json.loads(path.read_text())
    return actual


@pytest.mark.thorough
def test_compare_has_a_row_for_each_run(
    timed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, slow = timed, deepcopy(timed)
    (tmp_path / "one.json").write_text(json.dumps(one))
    for stage in slow["stages"].values():
        stage["p50"] *= 2
    slow |= {"device": "cuda:0", "device_name": "NVIDIA GeForce RTX 4090 Laptop GPU"}
    (tmp_path / "two.json").write_text(f"{json.dumps(slow)}\n{json.dumps(one | {'bucket': '640x480'})}\n")
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    assert run("compare", tmp_path / "one.json", tmp_path / "two.json", "--plot", tmp_path / "deep" / "plot.png") == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if not line.startswith("wrote")) <= 80
    totals, rest = shown.split("milliseconds of each stage")
    stages, machines = rest.split("on what")
    rows = {line.split()[0]: line.split() for line in totals.splitlines() if line.startswith((" one", " two"))}
    assert [rows[name][-2] for name in ("one", "two:1", "two:2")] == ["1.00x", "0.50x", "-"]  # another size
    slowed = float(rows["two:1"][-6])
    assert slowed == pytest.approx(2 * one["stages"]["total"]["p50"], rel=0.01)
    assert {"encoder", "denoiser", "decoder", "total"} < set(stages.split())
    assert "NVIDIA GeForce" in " ".join(machines.split())
    assert "their totals do not compare" in shown
    assert "2 runs are few" in shown
    with Image.open(tmp_path / "deep" / "plot.png") as picture:
        assert picture.width > 500


def test_throttled_runs_are_not_compared(
    timed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.json").write_text(json.dumps(timed))
    result = deepcopy(timed)
    result["conditions"]["throttled"] = ["hot"]
    (tmp_path / "bad.json").write_text(json.dumps(result))
    plot = tmp_path / "plot.png"
    assert run("compare", tmp_path / "good.json", tmp_path / "bad.json", "--plot", plot) == 1
    captured = capsys.readouterr()
    assert "throttled, and are not compared: bad (hot)" in captured.err
    assert not plot.exists()


@pytest.mark.thorough
def test_bench_takes_bundles_and_backends(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair; what cannot run is said, fails the command, and keeps nothing else from being timed and compared."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("COLUMNS", "80")
    wrong, file = make_toy_bundle(tmp_path / "wrong", references=1.01), tmp_path / "x.json"
    both = ("--backend", "onnxruntime", "--backend", "openvino", "--runs", 2, "--json", file)
    assert run("bench", bundle, wrong, *both) == 1
    captured = capsys.readouterr()
    assert "2 of 4 were not timed: wrong with onnxruntime; wrong with openvino" in captured.err
    assert captured.out.count("is left out: No speed is reported") == 2
    assert "milliseconds an image, end to end" in captured.out
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert [result["backend"] for result in results] == ["onnxruntime", "openvino"]


def test_compare_refuses_what_is_no_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for name, words in (("x.json", "no file of `densegeo bench"), ("y.json", "Cannot read")):
        assert run("compare", tmp_path / name) == 2
        assert words in capsys.readouterr().err


def test_ctrl_c_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Also by commands that have no summary of their own; typer makes an exit of it that says nothing."""
    command = typer.Typer()

    @command.command()
    def wait() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.guarded(lambda: command(args=[]))
    assert end.value.code == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


TORCH_STREAM = ("--stream", "--backend", "torch", "--device", "cpu")
WRONG = {
    "There is no 'foo'": ("bench", "--backend", "openvino", "--backend", "foo"),
    "none.png does not exist": ("bench", "--image", "none.png"),
    "Cannot write /dev/null/x.json": ("bench", "--json", "/dev/null/x.json"),
    "there is no builder 'nvcc'": ("engines", "--gpu-arch", 89, "--builder", "nvcc"),
    "none of auto, constant, input": ("engines", "--gpu-arch", 89, "--builder", "tensorrt_rtx", "--weights", "none"),
    "sm_42": ("engines", "--gpu-arch", 42, "--builder", "tensorrt_rtx"),
    "no format 'fp3'": ("calibrate", "--images", "x.png", "--format", "fp3"),
    "--attention is for": ("calibrate", "--images", "x.png", "--format", "int8", "--attention"),
    "--twice is for int8": ("calibrate", "--images", "x.png", "--convolutions", "--twice", "--max-normal-error", 1),
    "must be above 0": ("calibrate", "--images", "x.png", "--max-depth-error", 0),
    "--stream needs": ("calibrate", "--images", "x.png", "--stream"),
    "a budget needs errors": ("calibrate", "--images", "x.png", "--max-depth-error", 1, *TORCH_STREAM),
    "does not show": ("calibrate", "--images", "x.png", "--backend", "openvino"),
    "no backend 'nonsense'": ("calibrate", "--images", "x.png", "--backend", "nonsense"),
    "is no folder": ("calibrate", "--images", "x.png", "--output", __file__),
    "none-of-them": ("calibrate", "--images", "none-of-them"),
    "'gpu'": ("calibrate", "--images", "x.png", "--device", "gpu"),
    "TLS needs both": ("serve", "--tls-key", "none.pem"),
    "one mcap file": ("bag", "in.mcap", "out.bag"),
}


@pytest.mark.parametrize("says", WRONG)
def test_options_that_cannot_be_are_wrong_usage(says: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every command: exit code 2, before anything is computed or written."""
    command, *options = WRONG[says]
    before = sorted(bundle.rglob("*"))
    assert run(command, bundle, *options) == 2
    assert says in spoken(capsys)
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--backend", "onnxruntime"), "Missing option '--model'"),
        (("--model", "fe2e-tiny", "--precision", "fp3"), "no precision 'fp3'"),
        (("--model", "fe2e-tiny", "--backend", "onnxruntime", "--precision", "bf16"), "no bf16 kernels"),
        (("--model", "fe2e-tiny", "--size", "100x100"), "multiples of 16"),
    ],
)
def test_a_build_that_cannot_be_is_wrong_usage(
    options: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    assert run("build", "--output", tmp_path / "made", *options) == 2
    assert says in spoken(capsys)
    assert not (tmp_path / "made").exists()


def spoken(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said to standard error, without frames and line breaks."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_onnxruntime_reports_nothing(bundle: Path, tmp_path: Path) -> None:
    """No identifier of this device is written to the user's cache, from which on reports would be sent."""
    code = f"from densegeo import Estimator; Estimator({str(bundle)!r}, 'onnxruntime').close()"
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    made = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert all(parts[1] == "densegeo" for parts in made), made


def test_a_picture_that_cannot_be_drawn(
    timed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file keeps what it had."""
    (tmp_path / "one.json").write_text(json.dumps(timed))
    plot = tmp_path / "plot.xyz"
    plot.write_text("mine")
    assert run("compare", tmp_path / "one.json", "--plot", plot) == 2
    assert "name a file that ends in" in capsys.readouterr().err
    assert plot.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "plot.xyz"]


@pytest.mark.parametrize("command", ["inspect", "verify", "bench"])
def test_no_bundle(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, tmp_path) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "is not a densegeo bundle: it has no manifest.json" in error


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
    (tmp_path / MANIFEST).write_text("{}")
    result = run_process("inspect", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error:")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_standard_output_is_an_error(bundle: Path) -> None:
    code = "import sys\nfrom densegeo.cli import main\nmain(sys.argv[1:])"
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(bundle), "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "takes nothing more" in process.stderr


@pytest.mark.parametrize("command", ["build", "calibrate"])
def test_missing_extra_is_explained(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_torch(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "import_module", without_torch)
    assert run(command, "--help") == 1
    assert install_hint("export") in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run("doctor") == 0
    said = capsys.readouterr().out
    assert "onnxruntime" in said
    assert "nothing yet: densegeo verify" in said
    bundle = find_bundle("fe2e-tiny")
    verified.remember(bundle, "onnxruntime", "cpu")
    verified.remember(bundle, "openvino", "cpu", wrong="normals at 64x48 are off by 2")
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    actual = [(one["bundle"], one["backend"], one["good"], one["said"]) for one in report["verified"]]
    assert actual == [
        (str(bundle.resolve()), "onnxruntime", True, ""),
        (str(bundle.resolve()), "openvino", False, "normals at 64x48 are off by 2"),
    ]
    extras = {extra["name"]: extra for extra in report["extras"]}
    assert [*extras] == [extra.name for extra in EXTRAS]  # there or not
    assert (extras["cpu"]["lacks"], extras["cpu"]["install"], [*extras["cpu"]["have"]]) == ([], "", ["onnxruntime"])
    assert extras["gpu"]["install"].startswith("pip uninstall -y onnxruntime && ")
    assert run("doctor") == 0
    said = capsys.readouterr().out
    for words in ("passed", "failed, normals at 64x48", '".[gpu]"', "read HEIC", "suits it", "--precision"):
        assert words in " ".join(said.split()), words
    verified.forget(bundle, "onnxruntime")
    assert [one.good for one in examine().verified] == [False]
    assert re.match(r"--backend \w+ --precision \w+ \(backend: .*; precision: ", report["suits"])
    assert report["cpu_count"] >= 1
    assert report["gpu_note"]
    backends = {backend["name"].partition(" ")[0]: backend for backend in report["backends"]}
    assert {"onnxruntime", "openvino", "tensorrt", "torch"} <= set(backends)
    assert backends["tensorrt"]["usable"] != "yes"  # never executed on a GPU
