"""Which precision a build recommends: what was measured here, on the same work, and nothing else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from densegeo.benchmarks.latency import device_name
from densegeo.export.reporting import recommend
from densegeo.precision import QUANTIZED
from densegeo.runtime import measured, state
from densegeo.runtime.bundle import Manifest, Quantization, read_manifest
from densegeo.runtime.measured import Measured, advice, remember

GPU = "NVIDIA H100"


@pytest.fixture
def manifest(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return read_manifest(toy_bundle)


def record(
    manifest: Manifest, precision: str, p50: float, p90: float = 0.0, *, attention: bool = False, base: str = ""
) -> Measured:
    quantization = None
    if precision in QUANTIZED:
        quantization = Quantization(
            format=precision,
            method="mse",
            smooth=0.0,
            linears=["a"],
            attentions=["b"] if attention else [],
            share=1.0,
            depth_error=None,
            normal_error=None,
        )
    base = base or (precision if quantization is None else "bf16")
    variant = msgspec.structs.replace(manifest, precision=precision, base=base, quantization=quantization)
    return measured.measured(variant, manifest.buckets[0], "tensorrt", GPU, p50, p90 or 1.1 * p50)


def test_the_fastest_is_recommended(manifest: Manifest) -> None:
    for made in (
        record(manifest, "fp32", 90.0),
        record(manifest, "bf16", 40.0),
        record(manifest, "fp8", 30.0),
        record(manifest, "fp8", 25.0, attention=True),
        record(manifest, "fp8", 70.0, attention=True, base="fp32"),
    ):
        remember(made)
    (line,) = advice(manifest)
    assert line == (
        f"fp8 with attention is recommended at 64x48 on {GPU} (tensorrt): fp8 with attention took 25 ms, "
        "bf16 40 ms, both verified there"
    )


@pytest.mark.parametrize(("p50", "p90"), [(41.0, 44.0), (39.0, 60.0)])
def test_8_bits_that_are_no_faster_are_not(manifest: Manifest, p50: float, p90: float) -> None:
    """Nor where only the median is, and the tail is slower."""
    remember(record(manifest, "bf16", 40.0))
    remember(record(manifest, "fp8", p50, p90))
    (line,) = advice(manifest)
    assert line.startswith(f"bf16 is recommended at 64x48 on {GPU}")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"bucket": "128x96"},
        {"flops": 1},
        {"backend": "torch"},
        {"device": "NVIDIA L4"},
        {"machine": "elsewhere|"},
        {"what": "bf16"},
    ],
)
def test_other_work_and_other_machines_say_nothing(manifest: Manifest, change: dict[str, object]) -> None:
    remember(record(manifest, "bf16", 40.0))
    eight = record(manifest, "fp8", 20.0)
    remember(msgspec.structs.replace(eight, **change))  # type: ignore[arg-type]
    assert advice(manifest) == []
    remember(eight)
    assert len(advice(manifest)) == 1


def test_a_newer_run_takes_the_place_of_an_older_one(manifest: Manifest) -> None:
    remember(record(manifest, "bf16", 40.0))
    remember(record(manifest, "fp8", 20.0))
    remember(record(manifest, "fp8", 50.0))
    assert advice(manifest)[0].startswith("bf16 is recommended")
    assert len(list(state.folder("measured").iterdir())) == 2


def test_what_is_damaged_or_cannot_be_written_is_left_out(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(record(manifest, "bf16", 40.0))
    remember(record(manifest, "fp8", 20.0))
    (state.folder("measured") / "0.json").write_text("{")
    (state.folder("measured") / "1.json").write_text('{"model": 3}')
    assert len(advice(manifest)) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember(record(manifest, "bf16", 40.0))
    assert advice(manifest) == []


def test_a_build_says_it(manifest: Manifest) -> None:
    def said(variant: Manifest) -> str:
        console = Console(width=200)
        with console.capture() as capture:
            recommend(variant, console)
        return capture.get()

    assert said(manifest) == ""  # for no GPU, and nothing measured
    assert "No precision is recommended: `densegeo bench`" in said(
        msgspec.structs.replace(manifest, target_architectures=["sm_89"])
    )
    remember(record(manifest, "bf16", 40.0))
    remember(record(manifest, "fp8", 20.0))
    assert said(manifest).startswith("fp8 is recommended at 64x48")


def test_devices_by_name() -> None:
    machine = {"cpu": "Zen", "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 570.1, 9.0", "NVIDIA L4, 23034 MiB, 1, 8.9"]}
    assert device_name("cpu", machine) == "Zen"
    assert device_name("cuda:1", machine) == "NVIDIA L4"
    assert device_name("cuda", machine) == "NVIDIA H100 80GB HBM3"
    assert device_name("cuda:2", machine) == "cuda:2"
