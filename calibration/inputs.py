"""The inputs of a transformer's linears for one picture: from the graphs through ONNX Runtime, or through torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densegeo.errors import BackendError
from densegeo.models.rewrites import Pipeline
from densegeo.runtime.backends import open_backend
from densegeo.runtime.bundle import Bucket, Manifest

Float32 = NDArray[np.float32]
GROUP_BYTES = 1 << 30  # inputs that are in memory at a time
Inputs = Iterator[tuple[str, Float32]]  # a linear's name and its input (rows, K)


class LinearInputs(Protocol):
    """Runs encoder and transformer on rgb (1, 3, H, W) and shows what enters the transformer's linears."""

    def __call__(self, bucket: Bucket, rgb: Float32) -> Inputs: ...


class OnnxInputs:
    """Of a bundle's graphs on ONNX Runtime's CPU provider. Raises BackendError for graphs that it cannot run."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        if manifest.base == "bf16":
            raise BackendError(
                "ONNX Runtime's CPU provider has no bf16. Calibrate a bundle built with `--precision fp32`, or use "
                "--backend torch."
            )
        self._bundle = bundle
        self._backend = open_backend("onnxruntime", bundle, manifest, "cpu")
        self._sessions: dict[str, tuple[Any, list[tuple[str, str, int]]]] = {}

    def __call__(self, bucket: Bucket, rgb: Float32) -> Inputs:
        """One run for each group of inputs that fits into memory."""
        latent = self._backend.run(bucket, "encoder", rgb)
        session, watched = self._session(bucket.denoiser.file)
        feed = {bucket.denoiser.inputs[0].name: latent}
        for group in _groups(watched):
            values = dict(zip(group, session.run(group, feed), strict=True))
            for linear, value, _ in watched:
                if value in values:
                    yield linear, values[value].reshape(-1, values[value].shape[-1])

    def _session(self, name: str) -> tuple[Any, list[tuple[str, str, int]]]:
        """A session whose outputs are the linears' inputs, and (linear, value, bytes) for each."""
        if name not in self._sessions:
            import onnxruntime as ort

            model = onnx.load(self._bundle / name, load_external_data=False)
            typed = onnx.shape_inference.infer_shapes(model)
            known = {value.name: value for value in (*typed.graph.value_info, *typed.graph.input)}
            watched = []
            for node in model.graph.node:
                if node.op_type == "Gemm" and node.input[1].endswith(".weight"):
                    value = known[node.input[0]]
                    size = 4 * int(np.prod([axis.dim_value for axis in value.type.tensor_type.shape.dim]))
                    watched.append((node.input[1].removesuffix(".weight"), value.name, size))
            del model.graph.output[:]
            model.graph.output.extend(known[value] for value in dict.fromkeys(value for _, value, _ in watched))
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._bundle))
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            self._sessions[name] = session, watched
        return self._sessions[name]


def _groups(watched: list[tuple[str, str, int]]) -> Iterator[list[str]]:
    """Names of values, cut where a group would exceed GROUP_BYTES."""
    group: list[str] = []
    total = 0
    for name, size in {value: size for _, value, size in watched}.items():
        if group and total + size > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


class TorchInputs:
    """Of the project's own modules, on their device."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, bucket: Bucket, rgb: Float32) -> Inputs:
        """One run; inputs leave the device as they come."""
        transformer = self._pipeline.denoiser
        transformer.resize(bucket.width, bucket.height)
        seen: list[tuple[str, Float32]] = []

        def note(name: str, x: Tensor) -> None:
            seen.append((name, x.detach().flatten(0, -2).float().cpu().numpy()))

        handles = [
            layer.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
            for name, layer in transformer.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        try:
            device = transformer.prompt_embeds.device
            with torch.inference_mode():
                transformer(self._pipeline.vae.encoder(torch.from_numpy(rgb).to(device)))
        finally:
            for handle in handles:
                handle.remove()
        yield from seen
