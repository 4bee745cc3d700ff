"""TensorRT engines on an NVIDIA GPU, without torch: a bundle's engines, loaded and recorded when it is opened.

Never executed on a GPU yet: `densegeo verify BUNDLE --backend tensorrt` tells whether it works on yours.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from densegeo.backends import ENGINES
from densegeo.errors import BackendError, EngineError
from densegeo.extras import install_hint
from densegeo.runtime.backends.cuda_frames import CudaFrames
from densegeo.runtime.backends.cuda_memory import architecture_of, open_device
from densegeo.runtime.backends.cuda_weights import ALIGNMENT, upload_weights
from densegeo.runtime.backends.sharing import ALONE, Sharing, engines_need, require_room
from densegeo.runtime.backends.tensorrt_context import Stepper, make_context, stream_weights
from densegeo.runtime.backends.tensorrt_network import Steps
from densegeo.runtime.bundle import STAGES, Bucket, Engine, Manifest, Stage
from densegeo.runtime.engines import read_engine, renew_command, runs_on, select_engine, trusted
from densegeo.runtime.tensorfile import tensor_offsets


def open_backend(directory: Path, manifest: Manifest, device: str, sharing: Sharing = ALONE) -> TensorRTBackend:
    """Load and record the engines. Raises BackendError where TensorRT, a GPU or a fitting engine is missing."""
    if not manifest.engines:
        renew = renew_command(manifest, directory, architecture=_architecture(device))
        raise BackendError(f"{directory} has no TensorRT engines. Build some: {renew}")
    return TensorRTBackend(directory, manifest, open_device(device), sharing)


def _architecture(device: str) -> int | None:
    """Of the device, or None where there is none."""
    try:
        return architecture_of(open_device(device))
    except BackendError:
        return None


def load_library(manifest: Manifest, architecture: int) -> tuple[str, Any]:
    """The TensorRT library of the bundle's engines, preferably of those for this GPU (89 is sm_89).

    Raises EngineError when it is not installed.
    """
    fitting = {engine.library for engine in manifest.engines if runs_on(engine, architecture)}
    names = sorted({engine.library for engine in manifest.engines}, key=lambda name: (name not in fitting, name))
    for name in names:
        try:
            return name, import_module(name)
        except ImportError:
            continue
    raise EngineError(
        f"these engines need {' or '.join(names)}, which is not installed: "
        + (install_hint("tensorrt-rtx") if "tensorrt_rtx" in names else "pip install tensorrt")
    )


class TensorRTBackend(CudaFrames):
    """Engines of one bundle on one device."""

    name = ENGINES.name

    def __init__(self, directory: Path, manifest: Manifest, device: Any, sharing: Sharing = ALONE) -> None:
        self._directory, self._manifest, self._architecture = directory, manifest, architecture_of(device)
        self._library, self._trt = load_library(manifest, self._architecture)
        if sharing.memory_limit is not None:  # before anything is allocated
            need = engines_need(manifest, self._engines(), ALIGNMENT)
            require_room(directory, need, sharing.memory_limit, f"cuda:{device.device_id}")
        super().__init__(directory, manifest, device, sharing.priority)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._runtime.engine_host_code_allowed = False
        self._weights: dict[str, tuple[Any, dict[str, int]]] = {}  # stage -> its device buffer, addresses by name
        self._start()

    def _release(self) -> None:
        for buffer, _ in self._weights.values():
            buffer.close()
        self._weights.clear()

    def _load(self, bucket: Bucket) -> Steps:
        return {stage: self._stepper(bucket, stage) for stage in STAGES}

    def _engines(self) -> dict[str, dict[Stage, Engine]]:
        """Of every bucket that has them for this GPU, the first one's at least. Raises EngineError."""
        engines = {}
        for bucket in self._manifest.buckets:
            try:
                engines[bucket.name] = {stage: self._engine(bucket, stage) for stage in STAGES}
            except EngineError:
                if not engines:
                    raise
        return engines

    def _engine(self, bucket: Bucket, stage: Stage) -> Engine:
        return select_engine(
            self._directory,
            self._manifest,
            stage,
            bucket,
            library=self._library,
            version=str(self._trt.__version__),
            architecture=self._architecture,
        )

    def _stepper(self, bucket: Bucket, stage: Stage) -> Stepper:
        record = self._engine(bucket, stage)
        path = self._directory / record.file
        data = read_engine(self._directory, self._manifest, record, trust=trusted())
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineError(
                f"{path} cannot be loaded on this GPU (sm_{self._architecture}). "
                f"Rebuild it: {renew_command(self._manifest, self._directory, library=self._library)}"
            )
        if record.options.get("weight_streaming"):
            stream_weights(engine, path)
        digest = self._manifest.files[record.file].sha256
        context, compiled = make_context(self._trt, engine, path, digest, str(self._gpu.name))
        return Stepper(path, engine, context, self._addresses(record), compiled)

    def _addresses(self, record: Engine) -> dict[str, int]:
        """Device addresses of an engine's weight inputs: one copy of a stage's weights for all its engines."""
        if not record.weight_inputs:
            return {}
        if record.stage not in self._weights:
            path = self._directory / f"{record.stage}.safetensors"
            start, offsets = tensor_offsets(path)
            order = sorted(offsets, key=lambda name: offsets[name])  # without holes, as the format has it
            ends = [*(offsets[name] for name in order[1:]), path.stat().st_size - start]
            sizes = {name: end - offsets[name] for name, end in zip(order, ends, strict=True)}
            tensors = {name: (start + offsets[name], sizes[name]) for name in self._weight_inputs(record.stage)}
            self._weights[record.stage] = upload_weights(self._memory, path, tensors)
        _, addresses = self._weights[record.stage]
        return {name: addresses[name] for name in record.weight_inputs}

    def _weight_inputs(self, stage: Stage) -> set[str]:
        return {name for engine in self._manifest.engines if engine.stage == stage for name in engine.weight_inputs}
