"""OpenVINO backend for CPUs: one compiled model per graph, made for the first bucket at once, others when first used.

Unlike ONNX Runtime's CPU provider it runs bf16 bundles.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.backends import BACKENDS, backend_row
from densegeo.errors import BackendError, ConfigError
from densegeo.precision import PRECISIONS
from densegeo.processor import saturates_int8
from densegeo.runtime.backends.graphs import GraphBackend
from densegeo.runtime.backends.openvino_cache import CompiledModels
from densegeo.runtime.backends.openvino_graphs import widen_affines
from densegeo.runtime.backends.sharing import ALONE, Sharing
from densegeo.runtime.bundle import Graph, Manifest

# What float32 operations run in: bf16 ones stay bf16 where the CPU has it, while the hint "bf16" (the default on such
# CPUs) would lower the float32 parts of a bf16 graph too.
_HINT = "f32"
_ROW = backend_row("openvino")
log = logging.getLogger("densegeo")


def open_backend(
    directory: Path,
    manifest: Manifest,
    device: str,
    sharing: Sharing = ALONE,
    threads: int | None = None,
    calls_at_once: int = 1,
) -> OpenVinoBackend:
    """The backend of `densegeo.backends`' table; it shares no GPU. Raises BackendError, ConfigError, BundleError."""
    return OpenVinoBackend(directory, manifest, device, threads, calls_at_once)


class OpenVinoBackend(GraphBackend):
    """Compiled models over a bundle's graphs on the CPU."""

    name = _ROW.name
    device = "cpu"

    def __init__(
        self, directory: Path, manifest: Manifest, device: str, threads: int | None = None, calls_at_once: int = 1
    ) -> None:
        self._options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINT, "NUM_STREAMS": calls_at_once}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        if saturated(manifest):
            self._options["LP_TRANSFORMS_MODE"] = False
            log.warning(
                "%s is int8, and this processor has no VNNI: its 8-bit products would be cut off, so OpenVINO runs "
                "them in float32, slower than a float32 bundle. `densegeo calibrate --weight-bits 7` makes a plan that "
                "runs in 8 bits here.",
                directory,
            )
        self._quantized_bf16 = manifest.quantization is not None and manifest.base == "bf16"
        _require_cpu(device)
        try:
            self._openvino = import_openvino()
            self._core: Any = self._openvino.Core()
        except Exception as error:  # a broken installation raises more than ImportError
            raise BackendError(f"openvino cannot be imported ({error}). Reinstall it: {_ROW.install}.") from error
        self._models = CompiledModels(self._openvino, self._core, directory, manifest, self._options)
        self._start(directory, manifest)

    def _infer(self, loaded: Any, graph: Graph, array: NDArray[Any]) -> NDArray[np.float32]:
        feed = {graph.inputs[0].name: np.ascontiguousarray(array, dtype=np.float32)}
        try:
            output: NDArray[Any] = loaded.infer(feed)[graph.outputs[0].name]
        except Exception as error:  # RuntimeError, TypeError, KeyError: whatever the bindings let through
            raise BackendError(f"OpenVINO failed in {graph.file}: {error}") from error
        if output.dtype != np.float32:
            raise BackendError(f"OpenVINO returned {output.dtype} from {graph.file}, not float32.")
        return output

    def _load(self, path: Path) -> Any:
        def read() -> Any:
            model = self._core.read_model(path)
            if self._quantized_bf16:
                widen_affines(self._openvino, model)
            steps = self._openvino.preprocess.PrePostProcessor(model)
            # numpy has no bf16: such outputs would come back as arrays of another type
            steps.input(0).tensor().set_element_type(self._openvino.Type.f32)
            steps.output(0).tensor().set_element_type(self._openvino.Type.f32)
            return steps.build()

        try:
            return _Requests(self._models.load(path.name, read))
        except Exception as error:
            raise BackendError(f"OpenVINO cannot load {path}: {error}") from error


class _Requests:
    """A compiled model with the requests that run it. One serves one call at a time and holds the memory of its
    intermediate results, which takes longer to make than a small network to run: calls take one that is idle.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._idle: deque[Any] = deque()  # its ends are taken and given by several threads at once

    def infer(self, feed: dict[str, NDArray[Any]]) -> Any:
        """Outputs by name, copies. Raises what the library raises; that request is dropped then."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.model.create_infer_request()
        outputs = request.infer(feed)
        self._idle.append(request)
        return outputs


def saturated(manifest: Manifest) -> bool:
    """Whether 8-bit products of a bundle would not fit into this processor's sums."""
    plan = manifest.quantization
    return plan is not None and PRECISIONS[plan.format].integer and plan.weight_bits > 7 and saturates_int8()


def import_openvino() -> Any:
    """The library without its usage reports: importing it would send one over the network, unasked."""
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:
        return import_module("openvino")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # makes openvino take its silent stand-in
    try:
        return import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]


def _require_cpu(device: str) -> None:
    if device.partition(":")[0] == "cuda":
        able = ", ".join(row.name for row in BACKENDS if "cuda" in row.devices)
        raise ConfigError(f"The {_ROW.name} backend runs on CPUs only: for {device} take one of {able}.")
    if device not in ("auto", "cpu"):
        raise ConfigError(f'device must be "auto" or "cpu" for the {_ROW.name} backend, not {device!r}.')
