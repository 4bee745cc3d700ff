"""Weights that become inputs of a graph, without onnx: what onnx and its checker think of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from densegeo.errors import BundleError
from densegeo.export.graph_inputs import with_weight_inputs
from densegeo.runtime import ready
from densegeo.runtime.bundle import read_manifest


def by_onnx(path: Path) -> tuple[onnx.ModelProto, list[str]]:
    """The same with the library."""
    model = onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    widened = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    used = (widened.get(node.input[1], node.input[1]) for node in model.graph.node if node.op_type == "Gemm")
    names = [name for name in dict.fromkeys(used) if name in stored]
    for name in names:
        tensor = stored[name]
        model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
        model.graph.initializer.remove(tensor)
    return model, names


def quantized_graph(path: Path) -> Path:
    """Two products of one int8 weight, one of a float weight that is no constant, and a wide tensor inside the file."""
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["wide"], axis=0),
        helper.make_node("Gemm", ["x", "wide"], ["a"], transB=1),
        helper.make_node("Gemm", ["a", "wide"], ["b"], transB=1),
        helper.make_node("Identity", ["other"], ["made"]),
        helper.make_node("Gemm", ["b", "made"], ["c"], transB=1),
        helper.make_node("Gemm", ["c", "other", "bias"], ["y"], transB=1),
    ]
    random = np.random.default_rng(0)
    constants = {
        "weight": random.integers(-127, 128, (300, 300), dtype=np.int8),
        "scale": random.random(300, dtype=np.float32),
        "other": random.random((300, 300), dtype=np.float32),
        "bias": np.zeros(300, dtype=np.float32),
    }
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 300]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "quantized", values[:1], values[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("stage", ["encoder", "denoiser", "decoder"])
def test_a_bundles_graph_is_what_onnx_makes_of_it(tmp_path: Path, stage: str) -> None:
    bundle = ready.find_bundle("fe2e-tiny")
    path = bundle / getattr(read_manifest(bundle).buckets[0], stage).file
    target = tmp_path / "changed.onnx"
    expected, names = by_onnx(path)
    assert with_weight_inputs(path, target) == names
    assert onnx.load(target, load_external_data=False) == expected
    assert bool(names) == (stage == "denoiser")


def test_8_bit_weights_are_found_behind_their_scales(tmp_path: Path) -> None:
    path, target = quantized_graph(tmp_path / "quantized.onnx"), tmp_path / "changed.onnx"
    expected, names = by_onnx(path)
    assert with_weight_inputs(path, target) == names == ["weight", "other"]
    changed = onnx.load(target)
    assert changed == expected
    onnx.checker.check_model(changed, full_check=True)


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"no graph at all", lambda data: b""])
def test_what_is_no_graph_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = quantized_graph(tmp_path / "quantized.onnx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=r"quantized\.onnx is no ONNX graph"):
        with_weight_inputs(path, tmp_path / "changed.onnx")
