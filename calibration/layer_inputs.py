"""What enters networks' linears, attentions and convolutions for one picture: through ONNX Runtime from the graphs, or
torch.

An attention's queries, keys and values are three inputs, "NAME.q", "NAME.k" and "NAME.v".
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densegeo.backends import backend_row
from densegeo.errors import BackendError
from densegeo.models import chain
from densegeo.models.layers import Attention
from densegeo.models.quantized import AttentionPlan
from densegeo.models.rewrites import Pipeline
from densegeo.models.vae import Downsample
from densegeo.onnx_runtime import import_onnxruntime, session_options
from densegeo.runtime.backends import open_backend
from densegeo.runtime.bundle import Bucket, Graph, Manifest, Stage
from densegeo.runtime.host_chain import Chain

Float32 = NDArray[np.float32]
GROUP_BYTES = 1 << 30  # inputs that are in memory at a time
PIECE = 1 << 24  # numbers of a picture that are counted at a time
PARTS = AttentionPlan._fields  # "q", "k", "v"
See = Callable[[str, Float32], None]  # takes a name and an input (rows, features)

_ROW = backend_row("onnxruntime")


class LayerInputs(Protocol):
    """Runs a bundle's networks on rgb (1, 3, H, W) and shows what enters the denoiser's linears, as it comes.

    attention: and its attentions. convolutions: and all convolutions of all networks, a pixel a row, a large picture in
    several pieces. What `see` raises ends the run.
    """

    attention: bool
    convolutions: bool

    def __call__(self, bucket: Bucket, rgb: Float32, see: See) -> None: ...


class ObservedValue(NamedTuple):
    """A layer's input, what the graph calls it, and whether it is a picture (N, K, H, W)."""

    layer: str
    value: str
    picture: bool
    bytes: int


class OnnxInputs:
    """Of a bundle's graphs on ONNX Runtime's CPU provider. Raises BackendError for graphs that it cannot run."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        if manifest.base not in _ROW.precisions:
            raise BackendError(
                f"{_ROW.title}'s CPU provider has no {manifest.base}. Calibrate a bundle built with "
                "`--precision fp32`, or use --backend torch."
            )
        self.attention = self.convolutions = False
        self._bundle, self._decode = bundle, manifest.decode
        self._backend = open_backend(_ROW.name, bundle, manifest, "cpu")
        self._sessions: dict[str, tuple[Any, list[ObservedValue]]] = {}

    def __call__(self, bucket: Bucket, rgb: Float32, see: See) -> None:
        """One run of each graph for each group of inputs that fits into memory."""
        if self.convolutions:
            Chain(_ObservedGraphs(self, see), self._decode, bucket)(rgb)
        else:
            self.show(bucket, "denoiser", self.run(bucket, "encoder", rgb), see)

    def run(self, bucket: Bucket, stage: Stage, array: Float32) -> Float32:
        """A graph's own output."""
        return self._backend.run(bucket, stage, array)

    def show(self, bucket: Bucket, stage: Stage, array: Float32, see: See) -> None:
        """What enters the layers of one graph that takes `array`."""
        graph: Graph = getattr(bucket, stage)
        session, observed = self._session(stage, graph.file)
        for group in _groups(observed):
            arrays = dict(zip(group, session.run(group, {graph.inputs[0].name: array}), strict=True))
            for row in observed:
                if row.value in arrays:
                    for rows in _in_rows(arrays[row.value], picture=row.picture):
                        see(row.layer, rows)

    def _session(self, stage: Stage, name: str) -> tuple[Any, list[ObservedValue]]:
        """A session whose outputs are the layers' inputs, and what they are."""
        if name not in self._sessions:
            ort = import_onnxruntime()
            model = onnx.load(self._bundle / name, load_external_data=False)
            typed = onnx.shape_inference.infer_shapes(model)
            typed_values = {value.name: value for value in (*typed.graph.value_info, *typed.graph.input)}
            layers = [*_linears(model), *(_attentions(model) if self.attention else ())] if stage == "denoiser" else []
            pictures = [*_convolutions(model, stage)] if self.convolutions else []
            observed = [
                ObservedValue(layer, value, picture, _bytes(typed_values[value]))
                for picture, named_values in ((False, layers), (True, pictures))
                for layer, value in named_values
            ]
            del model.graph.output[:]
            model.graph.output.extend(typed_values[value] for value in dict.fromkeys(row.value for row in observed))
            options = session_options(ort)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._bundle))
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            self._sessions[name] = session, observed
        return self._sessions[name]


class _ObservedGraphs(NamedTuple):
    """Runs graphs for a `Chain`, and shows what enters their layers."""

    inputs: OnnxInputs
    see: See

    def run(self, bucket: Bucket, stage: Stage, array: Float32) -> Float32:
        self.inputs.show(bucket, stage, array, self.see)
        return self.inputs.run(bucket, stage, array)


def _in_rows(x: Float32, *, picture: bool) -> Iterator[Float32]:
    """x (..., K), or of a picture (N, K, H, W), as (rows, K); of pictures in pieces of at most PIECE numbers."""
    if not picture:
        yield x.reshape(-1, x.shape[-1])
        return
    step = max(1, PIECE // (x.shape[1] * x.shape[3]))
    for image in x:
        for top in range(0, x.shape[2], step):
            yield image[:, top : top + step].reshape(x.shape[1], -1).T  # a view, where the picture is small


def _linears(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """(linear, its input's value)."""
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1].endswith(".weight"):
            yield node.input[1].removesuffix(".weight"), node.input[0]


def _convolutions(model: onnx.ModelProto, stage: Stage) -> Iterator[tuple[str, str]]:
    """(convolution, its input's value); see `Pipeline.layers`. The kernel of a transposed one is what is stored, in
    another order.
    """
    prefix = "" if stage == "denoiser" else f"{stage}."
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            stored = node.input[1]
            while stored in makers and makers[stored].input:
                stored = makers[stored].input[0]
            if stored.endswith(".weight"):
                yield prefix + stored.removesuffix(".weight"), node.input[0]


def _attentions(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """("NAME.q", value), ... of each module `Attention`, whose name stands in its nodes' scopes."""
    makers = {node.output[0]: node for node in model.graph.node}
    products: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        scopes = next((row.value for row in node.metadata_props if row.key == "pkg.torch.onnx.name_scopes"), "[]")
        name = next((scope for scope in ast.literal_eval(scopes) if scope.endswith(".attention")), None)
        if name is not None and node.op_type == "MatMul":
            products.setdefault(name, []).append(node)
    for name, (logits, mixed) in products.items():
        query, key = (makers[value].input[0] for value in logits.input)  # before they are scaled and turned
        yield from zip((f"{name}.{part}" for part in PARTS), (query, key, mixed.input[1]), strict=True)


def _bytes(value: onnx.ValueInfoProto) -> int:
    return 4 * int(np.prod([axis.dim_value for axis in value.type.tensor_type.shape.dim]))


def _groups(observed: list[ObservedValue]) -> Iterator[list[str]]:
    """Names of values, cut where a group would exceed GROUP_BYTES."""
    group: list[str] = []
    total = 0
    for name, size in {row.value: row.bytes for row in observed}.items():
        if group and total + size > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


class TorchInputs:
    """Of the project's own modules, on their device."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.attention = self.convolutions = False
        self._pipeline = pipeline

    def __call__(self, bucket: Bucket, rgb: Float32, see: See) -> None:
        """One run; inputs leave the device as they come, and none is kept."""
        pipeline = self._pipeline
        pipeline.denoiser.resize(bucket.size)
        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name, note=note: note(see, name, inputs))
            for name, layer, note in self._layers()
        ]
        try:
            picture = torch.from_numpy(rgb).to(pipeline.denoiser.prompt_embeds.device)
            output = chain.denoise(pipeline, chain.encode(pipeline, picture))
            if self.convolutions:
                chain.decode(pipeline, chain.split(pipeline.decode, output, bucket.size))
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> Iterator[tuple[str, nn.Module, Callable[[See, str, tuple[Tensor, ...]], None]]]:
        """What is looked at: its name, where its input enters, and how that is shown."""
        for name, linear in self._pipeline.layers(nn.Linear).items():
            yield name, linear, _show
        if self.attention:
            for name, attention in self._pipeline.layers(Attention).items():
                yield name, attention, _show_three
        if self.convolutions:
            padding = {id(outer.conv): outer for outer in self._pipeline.layers(Downsample).values()}
            for name, layer in self._pipeline.layers(nn.Conv2d).items():
                yield name, padding.get(id(layer), layer), _show_picture  # before its zeros


def _show(see: See, name: str, arguments: tuple[Tensor, ...]) -> None:
    for rows in _in_rows(_numbers(arguments[0]), picture=False):
        see(name, rows)


def _show_three(see: See, name: str, arguments: tuple[Tensor, ...]) -> None:
    for part, x in zip(PARTS, arguments[:3], strict=True):
        _show(see, f"{name}.{part}", (x,))


def _show_picture(see: See, name: str, arguments: tuple[Tensor, ...]) -> None:
    for rows in _in_rows(_numbers(arguments[0]), picture=True):
        see(name, rows)


def _numbers(x: Tensor) -> Float32:
    numbers: Float32 = x.detach().float().cpu().numpy()
    return numbers
