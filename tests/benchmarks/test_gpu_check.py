"""The GPU check's script on a CPU at toy sizes: what it would measure runs, and a failure is not passed over."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from densegeo.backends import BACKENDS  # noqa: E402
from densegeo.benchmarks import gpu_check, gpu_fiffdepth, gpu_frames, gpu_models, gpu_rows  # noqa: E402
from densegeo.runtime.bundle import read_manifest, write_manifest  # noqa: E402

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(gpu_models, "_compile", lambda pipeline: None)  # takes minutes on a CPU
    monkeypatch.setattr(gpu_fiffdepth, "_compiled", lambda pipeline: pipeline)
    command = ["gpu_check.py", "--small", "--device", "cpu", "--output", str(output), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    code = gpu_check.main()
    return code, json.loads(output.read_text())


@pytest.mark.thorough
def test_every_measurement_of_fe2e_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ("numbers", "kernels", "models", "transfers")
    code, result = run(monkeypatch, tmp_path / "check.json", "--steps", *steps)
    assert code == 0
    actual = result["steps"]
    assert tuple(actual) == steps
    assert 0 < actual["numbers"]["ours"] <= actual["numbers"]["limit"] < 0.2
    for row in actual["numbers"]["fp8"].values():
        assert actual["numbers"]["plain"] < row["plain"] < 0.3  # it is 8-bit
        assert 0 < row["ours"] <= 2 * row["plain"]
    kernels = actual["kernels"]["kernels"]
    assert kernels["copy"]["of_copy"] == 1
    # a token's 64 features are read once and written once
    assert kernels["split"]["bytes"] == 2 * 4 * gpu_check.gpu_models.SMOKE.size.width * 48 // 256 * 64 * 2
    (size,) = actual["models"]["sizes"]
    rows = size["contenders"]
    assert set(rows) >= {"authors, eager", "batch 1, bf16, compiled", "folded, kernels, graph"}
    for row in rows.values():
        assert row["ms"] > 0
        assert row["relative_to_authors"] < 0.2
    bf16, fp8 = (rows[f"folded, kernels, graph{name}"]["relative_to_authors"] for name in ("", ", fp8"))
    assert bf16 < fp8
    assert rows["folded, kernels"]["relative_to_authors"] > 0  # bf16 cannot agree with float32 to the last bit
    assert actual["transfers"]["two in flight"] > 0
    assert result["commit"] is None or len(result["commit"]) >= 40


@pytest.mark.slow
def test_every_measurement_of_fiffdepth_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, result = run(monkeypatch, tmp_path / "check.json", "--steps", "fiffdepth", "profile")
    assert code == 0
    actual = result["steps"]
    fiffdepth = actual["fiffdepth"]
    assert all(0 < row["error"] <= fiffdepth["limit"] < 0.2 for row in fiffdepth["contenders"].values())
    assert all(row["ms"] > 0 for row in fiffdepth["contenders"].values())
    assert set(fiffdepth["ms an image of a batch"]) == {"1", "2", "4", "8"}
    assert all(len(actual["profile"][model]["kernels"]) > 10 for model in ("fe2e", "fiffdepth"))


@pytest.mark.thorough
def test_a_bundle_is_run_through_every_backend(
    small_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(small_bundle(), tmp_path / "bundle")
    arguments = ("--steps", "bundles", "--bundle", str(bundle))
    code, result = run(monkeypatch, tmp_path / "check.json", *arguments)
    assert code == 0
    backends = result["steps"]["bundles"]["backends"]
    assert set(backends) == {row.name for row in BACKENDS}
    assert "refused" in backends["tensorrt"]
    for name in ("onnxruntime", "torch"):
        most = max(backends[name]["bounds"].values())
        assert all(0 < error <= most for error in backends[name]["errors"].values())
        assert backends[name]["ms an image, 8 at once"] > 0


@pytest.mark.thorough
def test_every_change_is_timed_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose numbers are off is not."""
    monkeypatch.setattr(gpu_rows, "median_seconds", lambda way, device, runs: (way(), 1e-3)[1])
    actual = gpu_rows.measure("cpu", small=True, runs=1)
    assert len(actual) > 10
    assert all("before_ms" in row for row in actual.values()), actual
    lines = gpu_rows.table(actual).splitlines()
    assert len(lines) == 1 + len(actual)
    row = gpu_rows.Row("wrong", 1, lambda: torch.ones(3), lambda: torch.full((3,), 1.1), lambda: torch.ones(3))
    assert gpu_rows._timed(row, "cpu", 1) == {"failed": "off by 1.0e-01; 0.0e+00 before"}


@pytest.mark.slow
def test_a_frames_way_is_timed_on_and_off(small_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On backends that take frames here: torch, as on a GPU. Where the ways disagree there is no time."""
    bundle = small_bundle()
    actual = gpu_frames.measure(bundle, "cpu", 1)
    timed = {name: row for name, row in actual.items() if "before_ms" in row}
    assert set(timed) == {"torch: on the device from pixels to maps", "torch: two calls in flight"}
    assert all(row["before_ms"] > 0 < row["after_ms"] for row in timed.values())
    assert "prepared on the host" in actual["onnxruntime"]["refused"]
    assert "torch: two calls in flight" in gpu_rows.table(
        actual, "an image", gpu_frames.floor_ms(read_manifest(bundle))
    )
    monkeypatch.setattr(gpu_frames, "FACTOR", 0.0)
    assert "from the host's" in gpu_frames.measure(bundle, "cpu", 1)["torch: on the device"]["failed"]


@pytest.mark.thorough
def test_a_bundle_that_is_off_gets_no_speed(
    small_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(small_bundle(), tmp_path / "bundle")
    manifest = read_manifest(bundle)
    verification = msgspec.structs.replace(
        manifest.verification, bounds=dict.fromkeys(manifest.verification.bounds, 0.0)
    )
    write_manifest(bundle, msgspec.structs.replace(manifest, verification=verification))
    monkeypatch.setattr(gpu_check, "BACKENDS", [row for row in BACKENDS if row.name == "torch"])
    arguments = ("--steps", "bundles", "--bundle", str(bundle))
    code, result = run(monkeypatch, tmp_path / "check.json", *arguments)
    assert code == 1
    assert "out of bounds: prediction" in result["steps"]["bundles"]["failed"]
    assert "ms an image, 1 at once" not in result["steps"]["bundles"]["backends"]["torch"]


@pytest.mark.thorough
def test_a_failing_step_is_named_and_no_speed_follows_wrong_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine, off = {"plain": 0.01, "ours": 0.02}, {"plain": 0.01, "ours": 0.03}
    actual = {**off, "fp8": {"linears": fine, "linears and attention": off}}
    monkeypatch.setattr(gpu_models, "errors", lambda device, small: actual)
    code, result = run(monkeypatch, tmp_path / "check.json", "--steps", "numbers", "models", "kernels")
    assert code == 1
    assert result["steps"]["numbers"]["failed"] == "ours is off: bf16, fp8, linears and attention"
    assert "no speed is measured" in result["steps"]["models"]["failed"]
    assert "sizes" not in result["steps"]["models"]
    assert "kernels" in result["steps"]["kernels"]  # the rest goes on


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bundle", "none"), "none is not a densegeo bundle"),
        (("--output", "/dev/null/x.json"), "Not a directory"),
        (("--steps", "everything"), "invalid choice"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--small", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        gpu_check.main()
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_without_time_steps_are_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, result = run(monkeypatch, tmp_path / "check.json", "--steps", "kernels", "--budget", "10")
    assert code == 0
    assert result["steps"]["kernels"]["skipped"] == "no time left"


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--output", str(tmp_path / "check.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "check.json").exists()


@pytest.mark.slow
def test_quick_runs_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick: list[bool] = []

    def note(check: gpu_check.Check) -> dict[str, Any]:
        quick.append(check.quick)
        return {}

    monkeypatch.setattr(gpu_check, "STEPS", dict.fromkeys(gpu_check.STEPS, note))
    code, result = run(monkeypatch, tmp_path / "check.json", "--quick")
    assert code == 0
    assert tuple(result["steps"]) == gpu_check.QUICK
    assert quick == [True] * len(gpu_check.QUICK)
    _, result = run(monkeypatch, tmp_path / "check.json")
    assert tuple(result["steps"]) == tuple(gpu_check.STEPS)
