"""8-bit convolutions: from statistics and sensitivities through a plan to a bundle that OpenVINO and torch run."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors import safe_open
from torch import nn

from densegeo.calibration.plan import load_plan, plan_file
from densegeo.calibration.statistics import FILE, Statistics
from densegeo.calibration.work import multiply_adds
from densegeo.errors import BackendError, ConfigError, QuantizationError
from densegeo.export.build import build_bundle
from densegeo.export.graph_stats import node_flops, static_shapes
from densegeo.models.chain import relative_error
from densegeo.models.quantized import FEWEST_CHANNELS, QuantizedConvolution, QuantizedLinear
from densegeo.models.rewrites import stage_of
from densegeo.processor import is_x86, saturates_int8
from densegeo.runtime import Estimator
from densegeo.runtime.backends import openvino_cpu, torch_int8, torch_modules
from densegeo.runtime.backends.torch_int8 import Int8Convolution
from densegeo.runtime.backends.torch_modules import load_networks
from densegeo.runtime.backends.torch_pictures import fuse_pictures
from densegeo.runtime.bundle import STAGES, amount_quantized, read_manifest
from densegeo.runtime.verify import verify
from densegeo.size import Size
from tests.support.calibration import TWICE, run, stage_error
from tests.support.checkpoints import options
from tests.support.shared import Once

pytestmark = [pytest.mark.usefixtures("graphs_once"), pytest.mark.thorough]
KEPT = {
    "encoder.conv_in",
    "encoder.conv_out",
    "decoder.conv_in",
    "decoder.conv_out",
}


@pytest.fixture(scope="session")
def made(once: Once, small_checkpoint: Path, doubled: Path) -> Path:
    """The bundle of that plan, its floats in float32."""

    return once("convolved-bundle", lambda folder: _build(small_checkpoint, folder, doubled, "openvino")) / "bundle"


@pytest.fixture(scope="session")
def phases(once: Once, small_checkpoint: Path, doubled: Path) -> Path:
    """The same with upsampling in phases, as all builds but OpenVINO's have it."""
    return once("convolved-phases", lambda folder: _build(small_checkpoint, folder, doubled, "torch")) / "bundle"


def _build(checkpoint: Path, folder: Path, plans: Path, backend: str) -> None:
    quantized = {"precision": "int8", "base": "fp32", "calibration": plans, "backend": backend}
    build_bundle(options(checkpoint, folder / "bundle", **quantized))


def test_all_but_ends_and_shortcuts_are_planned(convolved: Path, bundle: Path) -> None:
    plan = load_plan(convolved, "int8")
    pipeline = load_networks(bundle, read_manifest(bundle), Size(48, 32), "cpu")
    every = pipeline.layers(nn.Conv2d)
    assert set(plan.operations) == set(every)
    assert set(plan.convolutions) == set(every) - KEPT
    assert set(plan.left) >= KEPT
    assert all(min(every[name].weight.shape[:2]) >= FEWEST_CHANNELS for name in plan.convolutions)
    assert {row.layer for row in plan.sensitivity} == {*plan.ranges, *plan.convolutions}
    assert plan.ranges.keys() == load_plan(convolved, "int8").ranges.keys() != set()
    for row in plan.sensitivity:
        assert row.error.depth is not None
        assert row.error.normals is not None
        assert row.error.depth > 0 or row.error.normals > 0, row.layer
    assert plan.error is not None
    assert plan.error.normals > max(row.error.normals for row in plan.sensitivity)
    assert plan.parameters == sum(row.parameters for row in plan.sensitivity)


def test_work_is_what_the_graphs_say(convolved: Path, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (bucket,) = manifest.buckets
    pipeline = load_networks(bundle, manifest, bucket.size, "cpu")
    work, in_graphs = multiply_adds(pipeline, bucket.size), dict[str, int]()
    for stage in STAGES:
        model = onnx.load(bundle / getattr(bucket, stage).file, load_external_data=False)
        shapes, prefix = static_shapes(model), "" if stage == "denoiser" else f"{stage}."
        for node in model.graph.node:
            if node.op_type in ("Conv", "Gemm"):
                in_graphs[prefix + node.input[1].removesuffix(".weight")] = node_flops(node, shapes) // 2
    assert {name: count for name, count in work.items() if not name.endswith(".attention")} == in_graphs
    tokens, hidden = 2 * 3 * 2 + 3, 32  # both halves of 48x32, and merged text
    assert work["single_blocks.0.attention"] >= 2 * 6 * tokens * hidden  # image tokens alone in the last block
    assert work["double_blocks.0.attention"] == 2 * tokens * tokens * hidden
    assert load_plan(convolved, "int8").operations == {name: work[name] for name in pipeline.layers(nn.Conv2d)}


def test_graphs_have_the_form_that_builders_fuse(phases: Path, doubled: Path) -> None:
    """Conv(DQ(Q(x)) with one scale, DQ(8-bit weight) with 1), and nothing in between; then a scale a row and the bias;
    two of them, with the same weight and one bias, where a convolution is in two products.
    """
    plan, manifest = load_plan(doubled, "int8"), read_manifest(phases)
    (bucket,) = manifest.buckets
    actual, rests, eight, every = set(), [], 0, 0
    for stage in STAGES:
        model = onnx.load(phases / getattr(bucket, stage).file, load_external_data=False)
        shapes, prefix = static_shapes(model), "" if stage == "denoiser" else f"{stage}."
        makers = {output: node for node in model.graph.node for output in node.output}
        takers = defaultdict[str, list[onnx.NodeProto]](list)
        for node in model.graph.node:
            for name in node.input:
                takers[name].append(node)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in (node for node in model.graph.node if node.op_type == "Conv"):
            if node.input[1] in stored:
                every += node_flops(node, shapes)
                continue
            weight, back = makers[node.input[1]], makers[node.input[0]]
            forth = makers[back.input[0]]
            rest = forth.input[1].endswith(".rest_scale")
            every += 0 if rest else node_flops(node, shapes)
            eight += 0 if rest else node_flops(node, shapes)
            assert (weight.op_type, back.op_type, forth.op_type) == (*["DequantizeLinear"] * 2, "QuantizeLinear")
            assert stored[weight.input[0]].data_type == TensorProto.INT8
            assert numpy_helper.to_array(stored[weight.input[1]]) == 1
            assert [*stored[forth.input[1]].dims] == []
            assert forth.input[1] == back.input[1]
            name = prefix + weight.input[0].removesuffix(".weight")
            (after,) = takers[node.output[0]]
            assert len(node.input) == 2
            assert after.op_type == "Mul"
            (last,) = takers[after.output[0]]
            (location,) = (entry.value for entry in stored[weight.input[0]].external_data if entry.key == "location")
            with safe_open(phases / location, "np") as weights:
                rows, bias = (
                    weights.get_tensor(weight.input[0].removesuffix("weight") + part)[:, None, None]
                    for part in ("weight_scale", "bias")
                )
            assert np.array_equal(numpy_helper.to_array(stored[after.input[1]]), rows)
            assert last.op_type == "Add"
            assert rest or np.array_equal(numpy_helper.to_array(stored[last.input[1]]), bias)
            even = makers[forth.input[0]]
            if name in TWICE:
                rests += [name] * rest
                assert rest or forth.input[1].endswith(".input_scale")
                assert (even.op_type == "Sub") == rest
                actual.add(name)
                continue
            assert not rest
            assert even.op_type == "Mul"
            assert [*stored[even.input[1]].dims] == [stored[weight.input[0]].dims[1], 1, 1]
            assert even.input[1].endswith(".input_factor")
            assert even.input[0] not in makers or makers[even.input[0]].op_type != "Pad"
            actual.add(name)
    assert actual == set(plan.convolutions)
    assert sorted(rests) == manifest.quantization.twice == TWICE
    assert plan.convolution_share == pytest.approx(eight / every)
    assert manifest.quantization is not None
    assert manifest.quantization.convolution_share == plan.convolution_share > 0.9
    assert set(manifest.quantization.convolutions) == actual


@pytest.mark.parametrize("vnni", [False, True])
def test_bundles_run_as_they_were_emulated(made: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool) -> None:
    """With VNNI in 8 bits; a processor without would cut sums off, and so runs them in float32."""
    pytest.importorskip("openvino")
    if vnni and saturates_int8():
        monkeypatch.setattr(openvino_cpu, "saturates_int8", lambda: False)
    elif not vnni:
        monkeypatch.setattr(openvino_cpu, "saturates_int8", lambda: True)
        verdict = verify(made, "openvino", "cpu")
        assert verdict.good, verdict
        assert stage_error(made, "openvino", "encoder") > 1e-4  # they are quantized
        assert stage_error(made, "openvino", "decoder") > 1e-4
    with Estimator(made, device="cpu") as estimator:
        assert estimator.backend == "openvino"  # not the table's first on a CPU
        assert np.isfinite(estimator(np.zeros((32, 48, 3), np.uint8)).prediction).all()
        for stage in ("encoder", "decoder"):
            assert executed(estimator, stage) <= ({"u8", "i8"} if vnni else {"f32"})


def executed(estimator: Estimator, stage: str) -> set[str]:
    """What OpenVINO's convolutions run in, those that are planned in 8 bits."""
    model = estimator._backend._loaded(estimator.manifest.buckets[0], stage).model
    plan = estimator.manifest.quantization
    actual = [node.get_rt_info() for node in model.get_runtime_model().get_ops()]
    kinds = [
        str(node["runtimePrecision"].astype(str))
        for node in actual
        if node["layerType"].astype(str) in ("Convolution", "Deconvolution")
    ]
    eight = [kind for kind in kinds if kind in ("u8", "i8")]
    planned = sum(stage_of(name) == stage for name in (*plan.convolutions, *plan.twice))
    assert len(eight) in (0, planned), kinds
    return {*eight} or {*kinds}


@pytest.mark.parametrize("vnni", [False, True])
def test_torch_runs_what_it_emulated(made: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool) -> None:
    """In 8 bits on a processor with VNNI, emulated on one without."""
    if vnni and saturates_int8():
        pytest.skip("this processor has none")
    monkeypatch.setattr(torch_int8, "saturates_int8", lambda: not vnni)
    backend = torch_modules.open_backend(made, read_manifest(made), "cpu")
    kinds = {type(module) for module in backend._pipeline.vae.modules()}
    assert (Int8Convolution in kinds) == (QuantizedConvolution not in kinds) == (vnni and is_x86())
    verdict = verify(made, "torch", "cpu")
    assert verdict.good, verdict
    for stage in ("encoder", "decoder"):
        assert stage_error(made, "torch", stage) > 1e-4
    with pytest.raises(BackendError, match=r"8-bit convolutions\. ONNX Runtime .* slower .* openvino or torch"):
        Estimator(made, "onnxruntime", "cpu")


def test_torch_runs_them_fused_too(made: Path, bundle: Path) -> None:
    """No further from the plain form than that is from float32: single roundings differ."""
    exact, vae = (load_networks(path, read_manifest(path), Size(48, 32), "cpu").vae for path in (bundle, made))
    assert any(isinstance(module, QuantizedConvolution) for module in vae.modules())
    fused, generator = fuse_pictures(vae), torch.Generator().manual_seed(0)
    with torch.no_grad():
        given = torch.rand(1, 3, 32, 48, generator=generator) * 2 - 1
        for stage in ("encoder", "decoder"):
            plain = getattr(vae, stage)(given)
            allowed = relative_error(plain, getattr(exact, stage)(given))
            assert relative_error(getattr(fused, stage)(given), plain) <= allowed
            given = plain


def test_what_is_said_of_them(made: Path) -> None:
    plan = read_manifest(made).quantization
    assert plan is not None
    said = amount_quantized(plan.share, len(plan.attentions), plan.convolution_share, plan.twice_share)
    convolutions = r"9\d\.\d% of the convolutions' operations \(1\d\.\d% in two products\)"
    assert re.fullmatch(rf"84\.0% of the linears' parameters and {convolutions}", said)
    assert amount_quantized(0.0, 0, 0.5) == "50.0% of the convolutions' operations"
    assert amount_quantized(0.5, 3, 0.5).startswith("50.0% of the linears' parameters, 3 attentions and 50.0%")


def test_a_budget_takes_the_least_harmful(bundle: Path, images: Path, convolved: Path, tmp_path: Path) -> None:
    free, folder = load_plan(convolved, "int8"), shutil.copytree(convolved, tmp_path / "copy")
    assert free.error is not None
    assert free.error.normals is not None
    expected: dict[str, Any] = {"kind": "int8", "convolutions": True, "smooth": None, "base": "fp32"}
    expected["max_normal_error"] = 0.5 * free.error.normals
    run(bundle, images, folder, **expected)
    plan = load_plan(folder, "int8")
    assert plan.error is not None
    assert plan.error.normals <= 0.5 * free.error.normals
    assert 0 < len(plan.convolutions) < len(free.convolutions)
    assert 0 < plan.convolution_share < free.convolution_share
    run(bundle, images, folder, **expected, twice=True)
    doubled = load_plan(folder, "int8")
    assert doubled.convolutions.keys() == free.convolutions.keys()
    assert 0 < len(doubled.twice) < len(free.convolutions)
    assert doubled.error.normals <= 0.5 * free.error.normals
    run(bundle, images, folder, kind="int8", smooth=0.5)  # the same statistics serve plans without
    assert load_plan(folder, "int8").convolutions == {}


def test_contradictions_are_refused(
    small_checkpoint: Path, calibrated: Path, convolved: Path, bundle: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--twice is for int8: .* fp8"):
        run(bundle, images, tmp_path / "fp8", convolutions=True, twice=True, max_normal_error=1.0)
    for given in ({"twice": True, "max_normal_error": 1.0}, {"twice": True, "convolutions": True}):
        with pytest.raises(ConfigError, match="--twice is for --convolutions within a budget: give"):
            run(bundle, images, tmp_path / "twice", kind="int8", **given)
    with pytest.raises(QuantizationError, match="made without --convolutions"):
        run(bundle, images, shutil.copytree(calibrated, tmp_path / "copy"), kind="int8", convolutions=True)
    with pytest.raises(ConfigError, match=r"plans 8-bit convolutions\. ONNX Runtime would run them slower"):
        build_bundle(options(small_checkpoint, tmp_path / "made", precision="int8", base="fp32", calibration=convolved))
    assert not (tmp_path / "made").exists()


def test_convolutions_alone_with_bf16_beside_them(small_checkpoint: Path, convolved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(convolved, tmp_path / "copy")
    plan = load_plan(folder, "int8")
    plan_file(folder, "int8").write_bytes(msgspec.json.encode(plan.keep(plan.convolutions)))
    expected = {"precision": "int8", "calibration": folder, "backend": "torch"}
    made = build_bundle(options(small_checkpoint, tmp_path / "made", **expected))
    manifest = read_manifest(made)
    assert manifest.quantization is not None
    assert manifest.quantization.linears == []
    assert verify(made, "torch", "cpu").good


def test_weights_of_7_bits_need_no_vnni(bundle: Path, images: Path, convolved: Path, tmp_path: Path) -> None:
    """Whatever the input, two products fit into 16 bits."""
    folder = shutil.copytree(convolved, tmp_path / "copy")
    run(
        bundle, images, folder, kind="int8", convolutions=True, smooth=None, backend="torch", stream=True, weight_bits=7
    )
    plan = load_plan(folder, "int8")
    assert plan.weight_bits == 7
    linear = QuantizedLinear.prepare(nn.Linear(16, 8), 1.0, plan.numbers, torch.float32)
    assert (linear.weight.abs().amax(dim=1) == 63).all()
    assert 2 * 255 * 63 < 2**15
    with pytest.raises(ConfigError, match="--weight-bits is for int8"):
        run(bundle, images, folder, kind="fp8", weight_bits=7)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_ways_of_looking_agree(
    small_bundle: Callable[..., Path], images: Path, convolved: Path, tmp_path: Path, backend: str
) -> None:
    """Graphs show what networks do, in both their forms: OpenVINO's upsample by transposed convolutions."""
    bundle = small_bundle(backend=backend)
    run(bundle, images / "0[0-7].png", tmp_path, kind="int8", convolutions=True, smooth=None)
    ours, theirs = Statistics.load(convolved / FILE), Statistics.load(tmp_path / FILE)
    assert ours.histograms.keys() == theirs.histograms.keys()
    for name, histogram in ours.histograms.items():
        assert histogram.counts.sum() == theirs.histograms[name].counts.sum(), name
        assert histogram.amax == pytest.approx(theirs.histograms[name].amax, rel=1e-3)
    assert load_plan(tmp_path, "int8").convolutions == pytest.approx(
        load_plan(convolved, "int8").convolutions, rel=0.05
    )
