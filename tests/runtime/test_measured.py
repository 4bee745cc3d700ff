"""Which precision a build recommends: what was measured here, on the same work, and nothing else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from densegeo.benchmarks.latency import device_name
from densegeo.export.reporting import recommend
from densegeo.precision import QUANTIZED
from densegeo.runtime import backends, measured, state, verified
from densegeo.runtime.bundle import Manifest, Networks, Quantization, read_manifest
from densegeo.runtime.measured import BUSY, ENOUGH, SPREAD, Conditions, Measured, advice, forget, remember

GPU = "NVIDIA H100"
GOOD = Conditions(runs=ENOUGH, variation=0.02, others=0.01)


@pytest.fixture
def manifest(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return read_manifest(toy_bundle)


def record(
    manifest: Manifest,
    precision: str,
    p50: float,
    p90: float = 0.0,
    *,
    attention: bool = False,
    convolutions: bool = False,
    base: str = "",
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
            convolutions=["encoder.mid.block_1.conv1"] if convolutions else [],
        )
    base = base or (precision if quantization is None else "bf16")
    variant = msgspec.structs.replace(manifest, precision=precision, base=base, quantization=quantization)
    return measured.measured(variant, manifest.buckets[0], "tensorrt", GPU, p50, p90 or 1.1 * p50, GOOD)


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
        f"fp8 with attention is recommended at 64x48 on {GPU} (tensorrt): fp8 with attention took 25 ms (p90 27.5), "
        "bf16 took 40 ms (p90 44); both were verified there"
    )


@pytest.mark.parametrize(
    ("p50", "p90", "why"),
    [
        (41.0, 45.0, "fp8 is no faster, and less accurate"),
        (39.0, 60.0, "the median of fp8 is shorter, its p90 is not"),
        (41.0, 43.0, "the p90 of fp8 is shorter, its median is not"),
        (39.99, 43.99, "fp8 is no faster"),  # as the digits say that are printed
    ],
)
def test_8_bits_that_are_no_faster_are_not(manifest: Manifest, p50: float, p90: float, why: str) -> None:
    """What is recommended follows from the numbers beside it, or the line says why not."""
    remember(record(manifest, "bf16", 40.0))
    remember(record(manifest, "fp8", p50, p90))
    (line,) = advice(manifest)
    assert line.startswith(f"bf16 is recommended at 64x48 on {GPU}")
    assert why in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runs": ENOUGH - 1}, "19 runs are few"),
        ({"others": BUSY + 0.2}, "other processes took 30 % of its processors"),
        ({"variation": SPREAD + 0.1}, "standard deviation 30 % of the mean"),
        ({"throttled": ["heat"]}, "throttled (heat)"),
    ],
)
def test_what_was_measured_badly_is_not_believed(manifest: Manifest, change: dict[str, object], words: str) -> None:
    bad = msgspec.structs.replace(GOOD, **change)  # type: ignore[arg-type]
    (doubt,) = bad.doubts
    assert words in doubt
    remember(record(manifest, "bf16", 40.0))
    fast = record(manifest, "fp8", 20.0)
    remember(msgspec.structs.replace(fast, conditions=bad))
    assert advice(manifest) == []
    remember(fast)
    assert advice(manifest)[0].startswith("fp8 is recommended")
    remember(msgspec.structs.replace(fast, p50=90.0, p90=99.0, conditions=bad))  # does not take its place
    assert advice(manifest)[0].startswith("fp8 is recommended")


def test_numbers_in_doubt_are_not_answered_by_older_ones(manifest: Manifest) -> None:
    """What was timed just now is before people's eyes: at its size and place nothing older is recommended."""
    fast, plain = record(manifest, "fp8", 20.0), record(manifest, "bf16", 40.0)
    for made in (fast, plain):
        remember(made)
    bad = msgspec.structs.replace(GOOD, runs=2)
    slow = msgspec.structs.replace(fast, p50=90.0, p90=99.0, conditions=bad)
    assert advice(manifest, [slow]) == []
    assert advice(manifest, [fast]) == advice(manifest)
    assert advice(manifest, [msgspec.structs.replace(slow, backend="torch")]) == advice(manifest)


def test_8_bit_convolutions_are_another_variant(manifest: Manifest) -> None:
    remember(record(manifest, "bf16", 40.0))
    remember(record(manifest, "int8", 50.0))
    remember(record(manifest, "int8", 20.0, convolutions=True))
    assert advice(manifest)[0].startswith("int8 with convolutions is recommended")


@pytest.mark.parametrize("driver", [False, True])
def test_auto_takes_what_was_fastest_here(
    manifest: Manifest,
    toy_bundle: Path,
    driver: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a CPU; where a GPU's driver is, records of the CPU and of the GPU are not told apart by the backend's name."""
    pytest.importorskip("openvino")
    monkeypatch.setattr(backends, "has_cuda_driver", lambda: driver)
    caplog.set_level("INFO", "densegeo")

    def taken() -> str:
        backend = backends.open_backend("auto", toy_bundle, manifest, "cpu")
        backend.close()
        return backend.name

    def keep(backend: str, p50: float, **changes: object) -> None:
        actual = measured.measured(manifest, manifest.buckets[0], backend, "a CPU", p50, 1.1 * p50, GOOD)
        remember(msgspec.structs.replace(actual, **changes))  # type: ignore[arg-type]

    assert taken() == "onnxruntime"
    keep("openvino", 5.0, bucket="1x1")
    keep("openvino", 5.0, machine="elsewhere|")
    keep("onnxruntime", 9.0)
    assert taken() == "onnxruntime"
    keep("openvino", 8.0)
    assert taken() == ("onnxruntime" if driver else "openvino")
    assert ("openvino, the fastest that `densegeo bench` measured here" in caplog.text) == (not driver)
    verified.remember(toy_bundle, "openvino", "cpu", "off by 1")
    assert taken() == "onnxruntime"
    verified.forget(toy_bundle, "openvino")


def test_engines_that_are_gone_are_forgotten(manifest: Manifest) -> None:
    remember(record(manifest, "bf16", 40.0))
    remember(msgspec.structs.replace(record(manifest, "fp8", 20.0), engines=["a", "b"]))
    forget(["c"])
    assert len(advice(manifest)) == 1
    forget(["b"])
    assert advice(manifest) == []
    assert len(list(state.folder("measured").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"bucket": "128x96"},
        {"work": "other"},
        {"backend": "torch"},
        {"device": "NVIDIA L4"},
        {"machine": "elsewhere|"},
        {"precision": "bf16"},
    ],
)
def test_other_work_and_other_machines_say_nothing(manifest: Manifest, change: dict[str, object]) -> None:
    remember(record(manifest, "bf16", 40.0))
    eight = record(manifest, "fp8", 20.0)
    remember(msgspec.structs.replace(eight, **change))  # type: ignore[arg-type]
    assert advice(manifest) == []
    remember(eight)
    assert len(advice(manifest)) == 1


def test_another_form_of_the_graphs_is_the_same_work(manifest: Manifest) -> None:
    """A backend's own form of upsampling has other operations; a network without a rewrite is another network."""
    network = Networks("fe2e", {"depth": 1}, {"ch": 32}, "prompt.safetensors")
    manifest = msgspec.structs.replace(manifest, networks=network)
    (bucket,) = manifest.buckets
    decoder = msgspec.structs.replace(bucket.decoder, flops=bucket.decoder.flops + 1)
    other_form = msgspec.structs.replace(manifest, buckets=[msgspec.structs.replace(bucket, decoder=decoder)])
    remember(record(manifest, "bf16", 40.0))
    remember(record(other_form, "fp8", 20.0))
    assert len(advice(manifest)) == 1
    for change in (
        {"rewrites": ["trim"]},
        {"networks": Networks("fe2e", {"depth": 2}, {"ch": 32}, "prompt.safetensors")},
    ):
        remember(record(other_form, "fp8", 20.0))
        assert advice(msgspec.structs.replace(manifest, **change)) == []


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
    (state.folder("measured") / "2.json").write_bytes(b'{"model": "\xff"}')
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
