"""Run an ONNX graph a few nodes at a time, so that a graph of any size can be checked in little memory.

With `widen`, bf16 is replaced by float32 throughout (weights keep their rounded values): the graph's float32 twin,
which ONNX Runtime can run on a CPU where it has no bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from densegeo.onnx_runtime import import_onnxruntime, session_options
from densegeo.runtime.backends.ort import AS_THEY_ARE

Array = NDArray[np.generic]
CHECK_BYTES = 512 << 20  # weights that are in memory at a time


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _chunks(model: onnx.ModelProto, limit: int) -> Iterator[list[onnx.NodeProto]]:
    """Cut the topologically ordered nodes wherever their weights would exceed `limit` bytes."""
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in model.graph.initializer}
    chunk: list[onnx.NodeProto] = []
    total = 0
    for node in model.graph.node:
        needed = sum(sizes.get(name, 0) for name in node.input)
        if chunk and total + needed > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(node)
        total += needed
    yield chunk


def _widened(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node with every mention of bf16 replaced by float32."""
    wide = onnx.NodeProto()
    wide.CopyFrom(node)
    for attribute in wide.attribute:
        if wide.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
    return wide


def run_blockwise(path: Path, feeds: dict[str, Array], *, widen: bool = False, limit: int = CHECK_BYTES) -> list[Array]:
    """Run the graph at `path` with ONNX Runtime's CPU provider, holding about `limit` bytes of weights at a time.

    feeds: input name -> array. Returns the graph's outputs in order.
    """
    ort = import_onnxruntime()
    model = onnx.load(path, load_external_data=False)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    graph_outputs = [output.name for output in model.graph.output]
    chunks = list(_chunks(model, limit))
    fp8 = any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)
    last_use = {name: index for index, chunk in enumerate(chunks) for node in chunk for name in node.input}
    live: dict[str, Array] = dict(feeds)
    for index, chunk in enumerate(chunks):
        produced = {name for node in chunk for name in node.output if name}
        consumed = {name for node in chunk for name in node.input if name}
        inputs = sorted((consumed - produced) & set(live))
        outputs = sorted(name for name in produced if last_use.get(name, -1) > index or name in graph_outputs)
        weights = []
        for name in sorted(consumed & set(initializers)):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(initializers[name])
            if external_data_helper.uses_external_data(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
                tensor.ClearField("external_data")
                tensor.data_location = TensorProto.DEFAULT
            if widen and tensor.data_type == TensorProto.BFLOAT16:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
            weights.append(tensor)
        graph = helper.make_graph(
            [_widened(node) if widen else node for node in chunk],
            "chunk",
            [_value_info(name, live[name]) for name in inputs],
            [onnx.ValueInfoProto(name=name) for name in outputs],  # ONNX Runtime infers the types
            weights,
        )
        piece = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
        options = session_options(ort)
        if fp8:
            options.add_session_config_entry(*AS_THEY_ARE)
        session = ort.InferenceSession(piece.SerializeToString(), options, providers=["CPUExecutionProvider"])
        live.update(zip(outputs, session.run(outputs, {name: live[name] for name in inputs}), strict=True))
        live = {name: value for name, value in live.items() if last_use.get(name, -1) > index or name in graph_outputs}
    return [live[name] for name in graph_outputs]


def _value_info(name: str, value: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
