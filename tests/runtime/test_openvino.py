"""The OpenVINO backend: the bundle's own precision, results in the right hands, and typed errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from densegeo.errors import BackendError, BundleError, ConfigError
from densegeo.runtime import Estimator
from densegeo.runtime import backends as table
from densegeo.runtime.backends import open_backend, openvino_cpu
from densegeo.runtime.backends.openvino_graphs import widen_affines
from densegeo.runtime.bundle import Bucket, read_manifest
from densegeo.runtime.verify import verify

if find_spec("openvino") is None:  # looked up: importing it here would send its usage report
    pytest.skip("openvino is not installed", allow_module_level=True)

NewBundle = Callable[..., Path]


def seeded(bucket: Bucket, seed: int = 0) -> np.ndarray:
    shape = bucket.encoder.inputs[0].shape
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_the_toy_bundle_gives_its_stored_outputs(toy_bundle: Path) -> None:
    checks = verify(toy_bundle, "openvino").served
    assert all(check.error < 1e-6 for check in checks), checks


def test_8_bit_products_over_bf16_load(tmp_path: Path) -> None:
    """Scales and shifts before and after an 8-bit convolution, in bf16: on a CPU that has bf16 OpenVINO refuses them as
    they are. Those of constants are widened, others stay.
    """
    rng = np.random.default_rng(5)
    scale, shift = (
        rng.uniform(0.5, 2, (1, 4, 1, 1)).astype(np.float32),
        rng.normal(0, 1, (1, 4, 1, 1)).astype(np.float32),
    )
    weight = rng.integers(-127, 127, (8, 4, 3, 3), dtype=np.int8)
    rows, bias = (
        rng.uniform(1e-3, 1e-2, (1, 8, 1, 1)).astype(np.float32),
        rng.normal(0, 1, (1, 8, 1, 1)).astype(np.float32),
    )
    step = np.float32(1 / 16)
    constants = {"scale": scale, "shift": shift, "rows": rows, "bias": bias}
    node = helper.make_node
    nodes = [
        node("Cast", ["x"], ["x16"], to=TensorProto.BFLOAT16),
        *(node("Cast", [name], [f"{name}16"], to=TensorProto.BFLOAT16) for name in constants),
        node("Mul", ["x16", "scale16"], ["scaled"]),
        node("Add", ["scaled", "shift16"], ["shifted"]),
        node("Relu", ["shifted"], ["positive"]),
        node("QuantizeLinear", ["positive", "step", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "step", "zero"], ["dq"]),
        node("DequantizeLinear", ["weight", "one", "zero"], ["dw"]),
        node("Conv", ["dq", "dw"], ["products"], pads=[1, 1, 1, 1]),
        node("Mul", ["products", "rows16"], ["in_rows"]),
        node("Add", ["in_rows", "bias16"], ["convolved"]),
        node("Sigmoid", ["convolved"], ["gate"]),
        node("Mul", ["convolved", "gate"], ["gated"]),
        node("Add", ["gated", "convolved"], ["sum"]),  # of no constants
        node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    stored += [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(np.int8(0), "zero")]
    for name, value in (("step", step), ("one", 1.0)):
        stored.append(onnx.numpy_helper.from_array(np.asarray(value, ml_dtypes.bfloat16), name))
    spec = helper.make_tensor_value_info
    inputs, outputs = [spec("x", TensorProto.FLOAT, [1, 4, 6, 5])], [spec("y", TensorProto.FLOAT, [1, 8, 6, 5])]
    model = helper.make_model(
        helper.make_graph(nodes, "affines", inputs, outputs, stored), opset_imports=[helper.make_opsetid("", 22)]
    )
    onnx.save(model, tmp_path / "affines.onnx")

    x = rng.normal(0, 2, (1, 4, 6, 5)).astype(np.float32)
    q = np.clip(np.round(np.maximum(x * scale + shift, 0) / step), -128, 127) * step
    padded = np.pad(q, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded[0], (3, 3), (1, 2))  # channels, rows, columns, 3, 3
    convolved = np.einsum("cyxij,ocij->oyx", windows, weight.astype(np.float32))[None] * rows + bias
    expected = convolved / (1 + np.exp(-convolved)) + convolved

    openvino = openvino_cpu.import_openvino()
    core = openvino.Core()
    read = core.read_model(tmp_path / "affines.onnx")
    assert widen_affines(openvino, read) == 2
    actual = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({0: x})[0]
    assert np.linalg.norm(actual - expected) <= 0.02 * np.linalg.norm(expected)


@pytest.mark.slow
def test_a_float32_bundle_is_not_lowered(built: dict[str, Path]) -> None:
    """OpenVINO's own default is bf16 wherever the CPU has it."""
    verdict = verify(built["fp32"], "openvino", "cpu")
    assert verdict.good, verdict
    assert all(check.bound <= 1e-5 for check in verdict.served), verdict


@pytest.mark.thorough
def test_a_bf16_bundle_is_within_its_bound(built: dict[str, Path]) -> None:
    verdict = verify(built["bf16"], "openvino", "cpu")
    assert verdict.good, verdict
    assert all(check.bound < 0.1 for check in verdict.served), verdict


@pytest.mark.thorough
def test_a_bf16_bundle_keeps_its_float32_parts(built: dict[str, Path]) -> None:
    with Estimator(built["bf16"], backend="openvino") as estimator:
        bucket = estimator.manifest.buckets[0]
        backend = estimator._backend
        model = backend._loaded(bucket, "denoiser").model
        has_bf16 = "BF16" in backend._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    executed = [
        {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")}
        for node in model.get_runtime_model().get_ops()
    ]

    def precisions(kind: str) -> set[str]:
        return {node["runtimePrecision"] for node in executed if node["layerType"] == kind}

    kept = [precisions(kind) for kind in ("MVN", "RMS", "Softmax")]
    # Where the CPU has no bf16, OpenVINO does not make one operator of each RMS norm.
    assert all(actual == {"f32"} for actual in kept if actual or has_bf16)
    assert any(kept)
    assert precisions("FullyConnected") == {"bf16" if has_bf16 else "f32"}


@pytest.mark.thorough
def test_auto_runs_a_bf16_bundle_on_a_cpu(built: dict[str, Path]) -> None:
    with Estimator(built["bf16"], device="cpu") as estimator:
        assert (estimator.backend, estimator.device) == ("openvino", "cpu")


def test_outputs_are_float32_whatever_the_graph_says(new_bundle: NewBundle) -> None:
    directory = new_bundle()
    manifest = read_manifest(directory)
    bucket = manifest.buckets[0]
    exact = open_backend("openvino", directory, manifest, "cpu").run(bucket, "encoder", seeded(bucket))
    path = directory / bucket.encoder.file
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "wide"
    model.graph.node.append(helper.make_node("Cast", ["wide"], ["output"], to=TensorProto.BFLOAT16))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.save(model, path)
    rounded = open_backend("openvino", directory, manifest, "cpu").run(bucket, "encoder", seeded(bucket))
    assert rounded.dtype == exact.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, rtol=2**-8)


def test_threads_get_their_own_results(new_bundle: NewBundle, run_in_threads: Callable[..., list[object]]) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (40 + 9 * i, 70 - 9 * i, 3), dtype=np.uint8) for i in range(4)]
    directory = new_bundle(sizes=((64, 48), (48, 64)))  # the second bucket is compiled by whichever thread needs it
    serial = Estimator(directory, backend="openvino").batch(images)
    shared = Estimator(directory, backend="openvino")
    runs = run_in_threads(lambda index: [shared(images[(index + i) % 4]) for i in range(40)], 4)
    for index, results in enumerate(runs):
        assert isinstance(results, list), results
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result.prediction, serial[(index + i) % 4].prediction)
            np.testing.assert_array_equal(result.normals, serial[(index + i) % 4].normals)


def test_results_outlive_later_calls_and_the_backend(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    bucket = manifest.buckets[0]
    backend = open_backend("openvino", bundle, manifest, "cpu")
    first = backend.run(bucket, "encoder", seeded(bucket, 1))
    kept = first.copy()
    backend.run(bucket, "encoder", seeded(bucket, 2))
    backend.close()
    np.testing.assert_array_equal(first, kept)


def test_devices(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs on CPUs only: for cuda:0 take one of .*torch"):
        Estimator(bundle, backend="openvino", device="cuda:0")
    for device in ("tpu", "cpu:1", "GPU"):
        with pytest.raises(ConfigError, match="device must be"):
            Estimator(bundle, backend="openvino", device=device)


def test_a_missing_graph(new_bundle: NewBundle) -> None:
    directory = new_bundle()
    manifest = read_manifest(directory)
    (directory / "decoder_64x48.onnx").unlink()
    with pytest.raises(BundleError, match="decoder_64x48"):
        open_backend("openvino", directory, manifest, "cpu")


def test_an_unreadable_graph(new_bundle: NewBundle) -> None:
    directory = new_bundle()
    path = directory / "encoder_64x48.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BackendError, match="OpenVINO cannot load"):
        Estimator(directory, backend="openvino", check_digests=False)


def test_misuse(new_bundle: NewBundle) -> None:
    directory = new_bundle()
    manifest = read_manifest(directory)
    bucket = manifest.buckets[0]
    backend = open_backend("openvino", directory, manifest, "cpu")
    with pytest.raises(BackendError, match=r"shape \[1, 3, 48, 64\], not \[1, 3, 8, 8\]"):
        backend.run(bucket, "encoder", np.zeros((1, 3, 8, 8), np.float32))
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(bucket, "encoder", seeded(bucket))


def test_a_graph_that_differs_from_the_manifest(new_bundle: NewBundle) -> None:
    directory = new_bundle()
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"name": "input"', '"name": "other"'))
    manifest = read_manifest(directory)
    bucket = manifest.buckets[0]
    with pytest.raises(BackendError, match="failed in encoder_64x48"):
        open_backend("openvino", directory, manifest, "cpu").run(bucket, "encoder", seeded(bucket))


def test_a_broken_installation(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"{name}.so: undefined symbol")

    monkeypatch.setattr(openvino_cpu, "import_module", broken)
    with pytest.raises(BackendError, match=r"undefined symbol.*\[openvino\]"):
        Estimator(bundle, backend="openvino")


def test_auto_names_every_reason(new_bundle: NewBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    rows = {row.name: row for row in table.BACKENDS}
    absent = dataclasses.replace(rows["openvino"], modules=("a_library_nobody_has",))
    monkeypatch.setattr(table, "BACKENDS", (rows["onnxruntime"], absent))
    with pytest.raises(BackendError, match=r"onnxruntime: .*no bf16[^$]*openvino: .*\[openvino\]"):
        Estimator(new_bundle(precision="bf16"), device="cpu")


RUN = """
import sys
import numpy as np
from densegeo.runtime import Estimator
with Estimator(sys.argv[1], backend="openvino") as estimator:
    estimator(np.full((50, 60, 3), 0.3, np.float32))
print("\\n".join(sys.modules))
"""


def test_a_fresh_process_needs_no_torch_and_reports_to_nobody(bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    roots = {name.partition(".")[0] for name in done.stdout.splitlines()}
    assert "openvino" in roots
    assert roots.isdisjoint(
        {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "safetensors", "openvino_telemetry"}
    )


def test_calls_that_share_the_threads(toy_bundle: Path, picture: np.ndarray) -> None:
    with Estimator(toy_bundle, "openvino") as one, Estimator(toy_bundle, "openvino", calls_at_once=2) as two:
        expected = one(picture).prediction
        for estimator, streams in ((one, 1), (two, 2)):
            loaded = [*estimator._backend._graphs.values()]  # type: ignore[attr-defined]
            assert {graph.model.get_property("NUM_STREAMS") for graph in loaded} == {streams}
        with ThreadPoolExecutor(3) as pool:
            for geometry in pool.map(two, [picture] * 6):
                np.testing.assert_allclose(geometry.prediction, expected, atol=1e-6)
