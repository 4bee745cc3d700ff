"""What enters a network's linears and attentions for one picture: through ONNX Runtime from the graphs, or torch.

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
from densegeo.models.layers import Attention
from densegeo.models.quantized import AttentionPlan
from densegeo.models.rewrites import Pipeline
from densegeo.runtime.backends import open_backend
from densegeo.runtime.bundle import Bucket, Manifest

Float32 = NDArray[np.float32]
GROUP_BYTES = 1 << 30  # inputs that are in memory at a time
PARTS = AttentionPlan._fields  # "q", "k", "v"
See = Callable[[str, Float32], None]  # takes a name and an input (rows, features)

_ROW = backend_row("onnxruntime")


class LayerInputs(Protocol):
    """Runs encoder and denoiser on rgb (1, 3, H, W) and shows what enters the denoiser's linears, as it comes.

    attention: and its attentions. What `see` raises ends the run.
    """

    attention: bool

    def __call__(self, bucket: Bucket, rgb: Float32, see: See) -> None: ...


class Watched(NamedTuple):
    """A layer's input and what the graph calls it."""

    layer: str
    value: str
    bytes: int


class OnnxInputs:
    """Of a bundle's graphs on ONNX Runtime's CPU provider. Raises BackendError for graphs that it cannot run."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        if manifest.base not in _ROW.precisions:
            raise BackendError(
                f"{_ROW.title}'s CPU provider has no {manifest.base}. Calibrate a bundle built with "
                "`--precision fp32`, or use --backend torch."
            )
        self.attention = False
        self._bundle = bundle
        self._backend = open_backend(_ROW.name, bundle, manifest, "cpu")
        self._sessions: dict[str, tuple[Any, list[Watched]]] = {}

    def __call__(self, bucket: Bucket, rgb: Float32, see: See) -> None:
        """One run for each group of inputs that fits into memory."""
        latent = self._backend.run(bucket, "encoder", rgb)
        session, watched = self._session(bucket.denoiser.file)
        feed = {bucket.denoiser.inputs[0].name: latent}
        for group in _groups(watched):
            values = dict(zip(group, session.run(group, feed), strict=True))
            for layer, value, _ in watched:
                if value in values:
                    see(layer, values[value].reshape(-1, values[value].shape[-1]))

    def _session(self, name: str) -> tuple[Any, list[Watched]]:
        """A session whose outputs are the layers' inputs, and what they are."""
        if name not in self._sessions:
            import onnxruntime as ort

            model = onnx.load(self._bundle / name, load_external_data=False)
            typed = onnx.shape_inference.infer_shapes(model)
            known = {value.name: value for value in (*typed.graph.value_info, *typed.graph.input)}
            layers = [*_linears(model), *(_attentions(model) if self.attention else ())]
            watched = [Watched(layer, value, _bytes(known[value])) for layer, value in layers]
            del model.graph.output[:]
            model.graph.output.extend(known[value] for value in dict.fromkeys(row.value for row in watched))
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._bundle))
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            self._sessions[name] = session, watched
        return self._sessions[name]


def _linears(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """(linear, its input's value)."""
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1].endswith(".weight"):
            yield node.input[1].removesuffix(".weight"), node.input[0]


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


def _groups(watched: list[Watched]) -> Iterator[list[str]]:
    """Names of values, cut where a group would exceed GROUP_BYTES."""
    group: list[str] = []
    total = 0
    for name, size in {row.value: row.bytes for row in watched}.items():
        if group and total + size > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


class TorchInputs:
    """Of the project's own modules, on their device."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.attention = False
        self._pipeline = pipeline

    def __call__(self, bucket: Bucket, rgb: Float32, see: See) -> None:
        """One run; inputs leave the device as they come, and none is kept."""
        transformer = self._pipeline.denoiser
        transformer.resize(bucket.size)

        def note(name: str, x: Tensor) -> None:
            see(name, x.detach().flatten(0, -2).float().cpu().numpy())

        def note_three(name: str, given: tuple[Tensor, ...]) -> None:
            for part, x in zip(PARTS, given[:3], strict=True):
                note(f"{name}.{part}", x)

        handles = []
        for name, layer in transformer.named_modules():
            if isinstance(layer, nn.Linear):
                handles.append(layer.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0])))
            elif isinstance(layer, Attention) and self.attention:
                handles.append(layer.register_forward_pre_hook(lambda _, given, name=name: note_three(name, given)))
        try:
            device = transformer.prompt_embeds.device
            with torch.inference_mode():
                transformer(self._pipeline.vae.encoder(torch.from_numpy(rgb).to(device)))
        finally:
            for handle in handles:
                handle.remove()
