"""What a TensorRT builder did, read from its verbose log: layers, types, fused attention, memory, and what looks wrong.

Without a GPU an engine cannot be inspected, but its builder's log (detailed profiling verbosity) lists every layer.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from densegeo.errors import BundleError
from densegeo.precision import PRECISIONS

_LAYER = re.compile(r"\bName: (?P<name>.+?), LayerType: (?P<kind>\w+), (?P<rest>.*)")
_SECTION = r"{}: \[(.*?)\](?=, (?:Inputs|Constants|Outputs|ParameterType|TacticName|TacticValue|StreamId|Metadata)\b|$)"
_TENSOR = re.compile(r"\{ Name: (\S+?), .*?Dimensions: \[([\d,]*)\].*?(?:Datatype|Format/Datatype): (\w+)")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_AMOUNTS = {
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+)"),
    "weight_bytes": re.compile(r"Total Weights Memory: (\d+)"),
}
_MATRIX_KINDS = {"gemm", "correlation", "MatrixMultiply", "CaskConvolution", "Convolution", "CaskGemmMatrixMultiply"}
_MOVES = re.compile(r"__myl_(?:Tran|Resh|Move|Slic|Conc)+_myl")
_FLOAT = {"Float", "FP32", "TF32"}


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str  # as the builder names it: "BFloat16", "Float", "FP8"


class Layer(NamedTuple):
    name: str
    kind: str  # the builder's LayerType
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    onnx: tuple[str, ...]  # names of the graph's nodes that became this layer

    @property
    def role(self) -> str:
        """attention, matmul, convolution, movement (copies and transposes alone) or pointwise."""
        if "mha" in self.name.lower():
            return "attention"
        if self.kind == "correlation" or "conv" in self.kind.lower():
            return "convolution"
        if self.kind in _MATRIX_KINDS or re.match(r"__myl_\w*Fc", self.name):
            return "matmul"
        if "reformat" in self.kind.lower() or (self.inputs and _MOVES.match(self.name)):
            return "movement"
        return "pointwise"

    @property
    def dtype(self) -> str:
        """The type of the operands; of a mix, all."""
        matrices = [tensor for tensor in (*self.inputs, *self.constants) if len(tensor.shape) > 1]
        names = {tensor.dtype for tensor in (matrices if self.role in ("matmul", "convolution") else self.inputs)}
        return "+".join(sorted(names or {tensor.dtype for tensor in self.outputs}))


class BuildLog(NamedTuple):
    layers: tuple[Layer, ...]
    activation_bytes: int
    weight_bytes: int


def parse_log(text: str) -> BuildLog:
    """Layers in order of execution, without those that only wait for another stream."""
    layers = tuple(layer for layer in _layers(text) if layer.kind not in ("signal", "wait"))
    amounts_of = {name: pattern.findall(text) for name, pattern in _AMOUNTS.items()}
    return BuildLog(layers, **{name: int(amounts[-1]) if amounts else 0 for name, amounts in amounts_of.items()})


def read_log(path: Path) -> str:
    """A compressed log's text. Raises BundleError."""
    try:
        with gzip.open(path, "rt", errors="replace") as file:
            return file.read()
    except (OSError, EOFError) as error:
        raise BundleError(f"cannot read the build log {path}: {error}") from error


def warnings(log: BuildLog, precision: str, *, float_tail: bool) -> list[str]:
    """What costs speed without need: one sentence a finding.

    float_tail: the last convolution is meant to be float32 (a decoder's).
    """
    findings = []
    wide = [layer for layer in log.layers if layer.role in ("matmul", "convolution") and _is_float(layer)]
    if not PRECISIONS[precision].exact:
        tail = [layer for layer in log.layers if layer.role == "convolution"][-1:] if float_tail else []
        findings += [
            f"{layer.name}: a float32 {layer.role} in a {precision} graph" for layer in wide if layer not in tail
        ]
    for layer in log.layers:
        softmax = [node for node in layer.onnx if "Softmax" in node]
        if softmax and layer.role != "attention":
            findings.append(f"{layer.name}: attention is not fused ({softmax[0]})")
    for layer in log.layers:
        if "reformat" in layer.kind.lower() or "reformat" in layer.name.lower():
            shape = "x".join(map(str, layer.outputs[0].shape)) if layer.outputs else "?"
            findings.append(f"{layer.name}: a reformat of {shape}")
    return findings


def _is_float(layer: Layer) -> bool:
    """Whether all operands are float32: results may be, where accumulators go out as they are."""
    return set(layer.dtype.split("+")) <= _FLOAT


def _layers(text: str) -> Iterator[Layer]:
    for line in text.splitlines():
        match = _LAYER.search(line)
        if match:
            rest = match["rest"]
            inputs, constants, outputs = (_tensors(rest, section) for section in ("Inputs", "Constants", "Outputs"))
            yield Layer(match["name"], match["kind"], inputs, constants, outputs, tuple(_ONNX.findall(rest)))


def _tensors(rest: str, section: str) -> tuple[Tensor, ...]:
    match = re.search(_SECTION.format(section), rest)
    listed = _TENSOR.findall(match[1]) if match else []
    return tuple(
        Tensor(name, tuple(int(size) for size in shape.split(",") if size), dtype) for name, shape, dtype in listed
    )
