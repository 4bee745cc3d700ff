"""ONNX Runtime's CPU provider has no bf16: a bf16 bundle's graphs in float32, with the weights as they were rounded."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from densegeo.runtime.bundle import STAGES, FileDigest, Manifest, sha256_file, write_manifest


def float32_bundle(bundle: Path, manifest: Manifest, folder: Path) -> Path:
    """A bundle that ONNX Runtime runs and that computes what this one does: itself, or its twin in `folder`."""
    if manifest.base != "bf16":
        return bundle
    graphs = [getattr(bucket, stage).file for bucket in manifest.buckets for stage in STAGES]
    for name in graphs:
        onnx.save(widened(onnx.load(bundle / name)), folder / name)
    files = {name: FileDigest((folder / name).stat().st_size, sha256_file(folder / name)) for name in graphs}
    changes = {"precision": "fp32", "base": "fp32", "files": files, "kernels": [], "engines": []}
    write_manifest(folder, msgspec.structs.replace(manifest, **changes))
    return folder


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every mention of bf16 becomes float32, in place."""
    for tensor in model.graph.initializer:
        widen_tensor(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen_tensor(attribute.t)
    del model.graph.value_info[:]  # they name types, and ONNX Runtime infers them
    return model


def widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
