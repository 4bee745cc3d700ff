"""ONNX Runtime backend: one session per graph, made for the first bucket at once and for others when first used."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends import has_cuda_driver, parse_device
from densegeo.runtime.backends.graphs import GraphBackend
from densegeo.runtime.bundle import Graph, Manifest

log = logging.getLogger("densegeo")

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
AS_THEY_ARE = ("session.disable_quant_qdq", "1")  # optimizers would move fp8 into operators that have none of it


def open_backend(directory: Path, manifest: Manifest, device: str) -> OrtBackend:
    """The backend of `densegeo.runtime.backends`' table. Raises BackendError, ConfigError, BundleError."""
    return OrtBackend(directory, manifest, device)


class OrtBackend(GraphBackend):
    """Sessions over a bundle's graphs on one execution provider."""

    name = "onnxruntime"

    def __init__(self, directory: Path, manifest: Manifest, device: str) -> None:
        try:
            self._ort: Any = import_module("onnxruntime")
        except Exception as error:  # a broken installation raises more than ImportError
            raise BackendError(
                f"onnxruntime cannot be imported ({error}). Reinstall it: pip install densegeo[cpu]."
            ) from error
        _require_precision(manifest.base)
        self._provider, self.device = _choose_provider(device, self._ort.get_available_providers())
        self._fp8 = manifest.precision == "fp8"
        self._options = _provider_options(self.device)
        if self._provider == CUDA:
            _load_libraries(self._ort)
        self._start(directory, manifest)

    def _infer(self, loaded: Any, graph: Graph, array: NDArray[Any]) -> NDArray[np.float32]:
        spec = graph.inputs[0]
        feed = {spec.name: np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))}
        try:
            (output,) = loaded.run([graph.outputs[0].name], feed)
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise BackendError(f"ONNX Runtime failed in {graph.file} on {self.device}: {error}") from error
        return np.asarray(output).astype(np.float32, copy=False)

    def _load(self, path: Path) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        if self._fp8:
            options.add_session_config_entry(*AS_THEY_ARE)
        try:
            session = self._ort.InferenceSession(
                str(path), options, providers=[self._provider], provider_options=[self._options]
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {path} on {self.device}: {error}") from error
        if session.get_providers()[0] != self._provider:
            raise BackendError(
                f"ONNX Runtime could not start {self._provider} (its log says why; often the CUDA or cuDNN libraries "
                'are missing, which densegeo[gpu] brings). Use device="cpu", or repair the installation.'
            )
        return session


def _require_precision(base: str) -> None:
    """Raises BackendError for bf16: the CPU provider has none, and the CUDA one lacks it in operators of our graphs
    (InstanceNormalization, QuantizeLinear: docs/OperatorKernels.md of ONNX Runtime).
    """
    if base == "bf16":
        raise BackendError(
            "This bundle is bf16, and ONNX Runtime has no bf16 for its operators, neither on CPUs nor on GPUs. Use "
            'backend="torch" (or "openvino" on a CPU, "tensorrt" with engines), or build it with `--precision fp32` or '
            "fp16 (fp8 and int8: with `--base fp32`)."
        )


def _choose_provider(device: str, available: list[str]) -> tuple[str, str]:
    """(execution provider, device name) for "auto", "cpu", "cuda" or "cuda:N"."""
    kind, index = parse_device(device)
    if kind == "cuda" and CUDA not in available:
        raise BackendError(
            "This ONNX Runtime has no CUDA provider. Install it with `pip install densegeo[gpu]` in place of [cpu], "
            'or use device="cpu".'
        )
    if kind == "cuda" or (kind == "auto" and CUDA in available and has_cuda_driver()):
        return CUDA, f"cuda:{index or 0}"
    return CPU, "cpu"


def _provider_options(device: str) -> dict[str, str]:
    """use_tf32, on by default, would round float32 operands to 11 bits, beyond the bounds of float32 bundles."""
    return {"device_id": device.partition(":")[2], "use_tf32": "0"} if device.startswith("cuda") else {}


def _load_libraries(ort: Any) -> None:
    """CUDA's and cuDNN's libraries from the packages that densegeo[gpu] brings: the system does not look there.

    ONNX Runtime before 1.21 has the system's alone.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    with redirect_stdout(io.StringIO()) as said:  # it prints what it does not find; the system may still have that
        ort.preload_dlls()
    if said.getvalue():
        log.info("onnxruntime.preload_dlls: %s", said.getvalue().strip())
