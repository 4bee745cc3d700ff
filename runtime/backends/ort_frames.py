"""ONNX Runtime's CUDA provider between our kernels: images stay on the device from the first network to the maps.

Inputs and outputs are bound to the buffers that TensorRT's engines would have, on one stream; nothing waits between.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from densegeo.backends import backend_row
from densegeo.errors import BackendError
from densegeo.runtime.backends.cuda_frames import CudaFrames
from densegeo.runtime.backends.cuda_memory import open_device
from densegeo.runtime.backends.ort import OrtBackend
from densegeo.runtime.backends.sharing import ALONE, Sharing
from densegeo.runtime.backends.tensorrt_network import Steps
from densegeo.runtime.bundle import STAGES, Bucket, Graph, Manifest

# onnxruntime_run_options_config_keys.h: a run returns when its work is enqueued. Whoever reads the result waits.
NO_WAIT = ("disable_synchronize_execution_providers", "1")


class OrtFrames(CudaFrames):
    """Sessions over a bundle's graphs on one device."""

    name = backend_row("onnxruntime").name
    recording = False  # a session allocates and frees while it runs

    def __init__(self, directory: Path, manifest: Manifest, sessions: OrtBackend, sharing: Sharing = ALONE) -> None:
        """sessions: makes them. Raises BackendError where cuda-core or kernels for this GPU are missing."""
        self._sessions = sessions
        super().__init__(directory, manifest, open_device(sessions.device), sharing.priority)
        if any(_other_types(getattr(bucket, stage)) for bucket in manifest.buckets for stage in STAGES):
            raise BackendError("graphs that take or give anything but float32 are run one by one")
        self._start()

    def _load(self, bucket: Bucket) -> Steps:
        handle = {"user_compute_stream": str(int(self._memory.stream.handle))}
        graphs = [getattr(bucket, stage) for stage in STAGES]
        sessions = [
            Session(self._sessions.library, self._sessions.session(graph, handle), graph, self.device)
            for graph in graphs
        ]
        return dict(zip(STAGES, sessions, strict=True))

    def _release(self) -> None:
        """Sessions are gone with the networks."""


class Session:
    """Runs one graph on the stream that its session was made for."""

    workspace = 0  # it has its own

    def __init__(self, ort: Any, session: Any, graph: Graph, device: str) -> None:
        self._session, self._graph = session, graph
        kind, _, index = device.partition(":")
        self._where = kind, int(index or 0)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(*NO_WAIT)
        self._bindings: dict[tuple[int, int], Any] = {}  # by the addresses of input and output

    def use(self, workspace: Any) -> None:
        """It needs none of others."""

    def keep_compiled(self) -> None:
        """It compiles nothing."""

    def launch(self, stream: Any, addresses: Mapping[str, int]) -> None:
        """Enqueue one run on these addresses. Raises BackendError."""
        input_spec, output_spec = self._graph.inputs[0], self._graph.outputs[0]
        try:
            binding = self._bound(addresses[input_spec.name], addresses[output_spec.name])
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise BackendError(f"ONNX Runtime failed in {self._graph.file} on {self._where}: {error}") from error

    def _bound(self, source: int, target: int) -> Any:
        """Buffers are fixed, so each pair is bound once."""
        if (source, target) not in self._bindings:
            binding = self._session.io_binding()
            input_spec, output_spec = self._graph.inputs[0], self._graph.outputs[0]
            binding.bind_input(input_spec.name, *self._where, np.float32, input_spec.shape, source)
            binding.bind_output(output_spec.name, *self._where, np.float32, output_spec.shape, target)
            self._bindings[source, target] = binding
        return self._bindings[source, target]


def _other_types(graph: Graph) -> bool:
    return any(spec.dtype != "float32" for spec in (graph.inputs[0], graph.outputs[0]))
