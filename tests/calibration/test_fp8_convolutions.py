"""fp8 convolutions: planned where asked for, with a warning; graphs, OpenVINO and torch give the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from rich.console import Console
from torch import nn

from densegeo.calibration.plan import load_plan
from densegeo.calibration.report import print_plan
from densegeo.errors import BackendError, ConfigError
from densegeo.export.blockwise import run_blockwise
from densegeo.export.build import build_bundle
from densegeo.export.onnx_graph import export_graph, write_weights
from densegeo.models.quantized import FORMATS, QuantizedConvolution
from densegeo.precision import CALIBRATED
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import STAGES, read_manifest
from densegeo.runtime.measured import _precision_in_words
from densegeo.runtime.verify import relative_error, verify
from tests.support.calibration import stage_error
from tests.support.checkpoints import options
from tests.support.shared import Once

pytestmark = pytest.mark.usefixtures("graphs_once")


@pytest.fixture(scope="session")
def made(once: Once, small_checkpoint: Path, convolved_fp8: Path) -> Path:
    """The bundle of that plan, its floats in float32."""

    def make(folder: Path) -> None:
        expected = {"precision": "fp8", "base": "fp32", "calibration": convolved_fp8, "backend": "openvino"}
        build_bundle(options(small_checkpoint, folder / "bundle", **expected))

    return once("fp8-convolved-bundle", make) / "bundle"


def test_plans_have_them_where_they_are_asked_for(convolved: Path, convolved_fp8: Path, calibrated: Path) -> None:
    """The same ones as in int8; by default none."""
    plan, other = load_plan(convolved_fp8, "fp8"), load_plan(convolved, "int8")
    assert plan.convolutions.keys() == other.convolutions.keys()
    assert (plan.smooth, other.smooth) == (0.0, 0.5)  # steps that grow with numbers need no even channels
    assert plan.convolution_share == other.convolution_share > 0.9
    assert load_plan(calibrated, "fp8").convolutions == {}


def test_a_plan_says_that_they_were_not_timed(
    convolved: Path, convolved_fp8: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It alone: of int8 convolutions kernels are known that are faster."""
    said = []
    for folder, kind in ((convolved_fp8, "fp8"), (convolved, "int8"), (calibrated, "fp8")):
        print_plan(load_plan(folder, kind), Console(width=400))
        said.append("none was timed" in capsys.readouterr().out)
    assert said == [True, False, False]


@pytest.mark.parametrize("kind", CALIBRATED)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (1, 1, 0)])
def test_a_graph_gives_the_emulations_numbers(
    tmp_path: Path, kind: str, kernel: int, stride: int, padding: int
) -> None:
    """One convolution, float32 beside it, on ONNX Runtime."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(24, 32, kernel, stride, padding), torch.randn(1, 24, 11, 9)
    module = nn.Sequential(QuantizedConvolution.prepare(layer, float(x.abs().max()), FORMATS[kind], torch.float32))
    weights, path = tmp_path / "weights.safetensors", tmp_path / "graph.onnx"
    write_weights(module, weights)
    export_graph(module, x, ("x", "y"), weights, path)
    (actual,) = run_blockwise(path, {"x": x.numpy()})
    assert relative_error(actual, module(x).numpy()) <= 1e-5


@pytest.mark.thorough
def test_graphs_have_the_form_that_builders_fuse(made: Path, convolved_fp8: Path) -> None:
    """Conv(DQ(Q(x)) with one scale, DQ(E4M3 weight) with 1), without a bias; then a scale a row."""
    (bucket,), actual = read_manifest(made).buckets, set()
    for stage in STAGES:
        model = onnx.load(made / getattr(bucket, stage).file, load_external_data=False)
        prefix = "" if stage == "denoiser" else f"{stage}."
        makers = {output: node for node in model.graph.node for output in node.output}
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in (node for node in model.graph.node if node.op_type == "Conv" and node.input[1] not in stored):
            weight, back = makers[node.input[1]], makers[node.input[0]]
            forth = makers[back.input[0]]
            assert [weight.op_type, back.op_type, forth.op_type] == [*["DequantizeLinear"] * 2, "QuantizeLinear"]
            assert {stored[name].data_type for name in (weight.input[0], forth.input[2])} == {TensorProto.FLOAT8E4M3FN}
            assert numpy_helper.to_array(stored[weight.input[1]]) == 1
            assert [*stored[forth.input[1]].dims] == []
            assert len(node.input) == 2
            (after,) = (other for other in model.graph.node if node.output[0] in other.input)
            assert after.op_type == "Mul"
            actual.add(prefix + weight.input[0].removesuffix(".weight"))
    assert actual == load_plan(convolved_fp8, "fp8").convolutions.keys()


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_bundles_run_as_they_were_emulated(made: Path, backend: str) -> None:
    pytest.importorskip(backend)
    verdict = verify(made, backend, "cpu")
    assert verdict.good, verdict
    for stage in ("encoder", "decoder"):
        assert stage_error(made, backend, stage) > 1e-4  # they are quantized
    assert _precision_in_words(read_manifest(made)) == "fp8 with convolutions, the rest fp32"  # a variant of its own


@pytest.mark.thorough
def test_onnx_runtime_refuses_them(made: Path, small_checkpoint: Path, convolved_fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"8-bit convolutions\. ONNX Runtime .* slower .* openvino or torch"):
        Estimator(made, "onnxruntime", "cpu")
    expected = {"precision": "fp8", "base": "fp32", "calibration": convolved_fp8, "backend": "onnxruntime"}
    with pytest.raises(ConfigError, match=r"plans 8-bit convolutions\. ONNX Runtime would run them slower"):
        build_bundle(options(small_checkpoint, tmp_path / "made", **expected))


@pytest.mark.thorough
def test_with_bf16_beside_them(small_checkpoint: Path, convolved_fp8: Path, tmp_path: Path) -> None:
    expected = {"precision": "fp8", "calibration": convolved_fp8, "backend": "torch"}
    made = build_bundle(options(small_checkpoint, tmp_path / "made", **expected))
    for backend in ("openvino", "torch"):
        assert verify(made, backend, "cpu").good
    with Estimator(made, "torch", "cpu") as estimator:
        assert np.isfinite(estimator(np.zeros((32, 48, 3), np.uint8)).prediction).all()
