"""What an ONNX graph costs: nodes, parameters, floating-point operations; read from the graph alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import onnx
from onnx import shape_inference

from densegeo.errors import ExportError
from densegeo.precision import PRECISIONS
from densegeo.runtime.bundle import Graph, TensorSpec

_NUMBERS = {  # of parameters; shapes and indices are INT64
    onnx.TensorProto.DataType.Value(row.onnx) for row in PRECISIONS.values()
}


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def node_flops(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    """Floating-point operations of a MatMul, Gemm, Conv or ConvTranspose node, multiply-add = 2; 0 for others."""
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return 0
    try:
        first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    except KeyError as error:
        raise ExportError(f"node {node.name} ({node.op_type}) has no static shape for {error}") from error
    if node.op_type == "Conv":
        return 2 * math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(first) * math.prod(second[1:])
    inner = first[-1] if node.op_type == "MatMul" or not _attribute(node, "transA", 0) else first[0]
    return 2 * math.prod(out) * inner


def static_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Value name -> shape, for every value whose shape is static."""
    model = copy.deepcopy(model)
    for opset in model.opset_import:  # the same operators; 22 lets convolutions and norms be bf16, as engines do
        opset.version = max(opset.version, 22) if opset.domain == "" else opset.version
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shapes: dict[str, list[int]] = {tensor.name: list(tensor.dims) for tensor in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = [dim.dim_value for dim in dims]
    return shapes


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, [dim.dim_value for dim in tensor.shape.dim])


def describe(path: Path) -> Graph:
    """Read a graph file's interface and cost; weights are not loaded."""
    model = onnx.load(path, load_external_data=False)
    shapes = static_shapes(model)
    return Graph(
        file=path.name,
        inputs=[_spec(value) for value in model.graph.input],
        outputs=[_spec(value) for value in model.graph.output],
        nodes=len(model.graph.node),
        parameters=sum(math.prod(t.dims) for t in model.graph.initializer if t.data_type in _NUMBERS),
        flops=sum(node_flops(node, shapes) for node in model.graph.node),
    )
