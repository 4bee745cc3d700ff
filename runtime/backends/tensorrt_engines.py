"""TensorRT engines on an NVIDIA GPU, without torch: a bundle's engines, loaded and recorded when it is opened.

Never executed on a GPU yet: `densegeo verify BUNDLE --backend tensorrt` tells whether it works on yours.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.backends import ENGINES
from densegeo.colors import Color
from densegeo.errors import BackendError, EngineError
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.outputs import Maps
from densegeo.runtime.backends.cuda_array import DeviceArray
from densegeo.runtime.backends.cuda_input import pixels_of
from densegeo.runtime.backends.cuda_kernels import Kernels
from densegeo.runtime.backends.cuda_memory import Memory, architecture_of, open_device
from densegeo.runtime.backends.cuda_weights import upload_weights
from densegeo.runtime.backends.tensorrt_context import Stepper, make_context, stream_weights
from densegeo.runtime.backends.tensorrt_network import Network
from densegeo.runtime.bundle import STAGES, Bucket, Engine, Manifest, Stage
from densegeo.runtime.engines import read_engine, renew_command, runs_on, select_engine, trusted
from densegeo.runtime.resample import Placement, in_batches
from densegeo.runtime.tensorfile import tensor_offsets

log = logging.getLogger("densegeo")

Steppers = dict[Stage, Stepper]


def open_backend(directory: Path, manifest: Manifest, device: str) -> TensorRTBackend:
    """Load and record the engines. Raises BackendError where TensorRT, a GPU or a fitting engine is missing."""
    if not manifest.engines:
        raise BackendError(f"{directory} has no TensorRT engines. Build some: {renew_command(manifest, directory)}")
    return TensorRTBackend(directory, manifest, open_device(device))


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
        f"these engines need {' or '.join(names)}, which is not installed: pip install "
        + ('"densegeo[tensorrt-rtx]"' if "tensorrt_rtx" in names else "tensorrt")
    )


class TensorRTBackend:
    """Engines of one bundle on one device; calls from several threads take turns.

    Opening pays for all that a first run costs: a request loads, allocates and records nothing but its own image's
    buffers. The first bucket must work; another one that cannot be opened is left out, with a line in the log. Without
    the one for a batch, its images run in smaller ones.
    """

    name = ENGINES.name
    takes_frames = True

    def __init__(self, directory: Path, manifest: Manifest, device: Any) -> None:
        self._directory, self._manifest = directory, manifest
        self.device = f"cuda:{device.device_id}"
        self._gpu, self._architecture = device, architecture_of(device)
        self._library, self._trt = load_library(manifest, self._architecture)
        self._memory = Memory(device)
        self._kernels = Kernels(directory, manifest.kernels, self._architecture)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._runtime.engine_host_code_allowed = False
        self._weights: dict[str, tuple[Any, dict[str, int]]] = {}  # stage -> its device buffer, addresses by name
        self._networks: dict[str, Network] = {}  # by the bucket's name
        self._failed: dict[str, BackendError] = {}  # why a bucket is not there
        self._lock = threading.Lock()
        self._closed = False
        with self._running():
            self._open()
        self._buckets = [bucket for bucket in manifest.buckets if bucket.name in self._networks]
        self.frames_at_once = max(bucket.batch for bucket in self._buckets)
        self.records = all(network.recorded for network in self._networks.values())

    def warm_up(self, most: int) -> None:
        """See `FrameBackend`: opening did all of it, since the bundle says how many images its engines take."""

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> NDArray[np.float32]:
        """Run one engine, eager: (its input) -> its output. Raises BackendError."""
        with self._running():
            return self._network(bucket).run(stage, np.ascontiguousarray(array, dtype=np.float32))

    def estimate(
        self,
        bucket: Bucket,
        pixels: Sequence[NDArray[np.uint8]],
        placements: Sequence[Placement],
        color: Color = "rgb",
    ) -> list[Maps[NDArray[np.float32]]]:
        """Pixels (h, w, 3) or YCbCr -> the maps of each, in the bundle's batches. Raises BackendError."""
        results: list[Maps[NDArray[np.float32]]] = []
        with self._running():
            self._memory.reclaim()
            self._network(bucket)
            for fitting, part in in_batches(self._buckets, bucket, len(pixels)):
                network = self._network(fitting)
                for index, (image, placement) in enumerate(zip(pixels[part], placements[part], strict=True)):
                    network.prepare(index, network.upload(np.ascontiguousarray(image)), placement, color)
                network.launch()
                results += network.results(placements[part])
        return results

    def keep(
        self, bucket: Bucket, image: Any, placement: Placement, color: Color, metres: Metres | None = None
    ) -> Maps[DeviceArray]:
        """The same for one image, uint8 (h, w, 3) or YCbCr on the device, where it is not copied, or on the host.

        It is read behind its producer's stream, and may be overwritten when this returns. The results stay on the
        device, ready for whichever stream takes them. Raises BackendError.
        """
        with self._running():
            network = self._network(bucket)
            pixels = pixels_of(image, self._memory)
            if isinstance(pixels, np.ndarray):
                pixels = network.upload(pixels)
            network.prepare(0, pixels, placement, color)
            read = self._memory.record()
            network.launch()
            results = network.outputs(0, placement, metres)
            ready = self._memory.record()
            for result in results.named().values():
                result.ready_after(ready)
            read.sync()
            return results

    def close(self) -> None:
        """Drop engines and buffers; results that are still held stay good."""
        with self._lock, self._memory.current():
            self._closed = True
            self._networks.clear()
            self._weights.clear()
            self._memory.close()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One thread at a time, with the device as its current one."""
        with self._lock, self._memory.current():
            if self._closed:
                raise BackendError("This estimator is closed. Make a new Estimator.")
            yield

    def _network(self, bucket: Bucket) -> Network:
        if bucket.name not in self._networks:
            raise self._failed[bucket.name]
        return self._networks[bucket.name]

    def _open(self) -> None:
        """All engines first, because they share one workspace; then buffers and recordings. Raises BackendError."""
        first, *others = self._manifest.buckets
        loaded = {first.name: (first, self._load(first))}
        for bucket in others:
            try:
                loaded[bucket.name] = bucket, self._load(bucket)
            except BackendError as error:
                self._leave_out(bucket, error)
        workspace = self._workspace(loaded, first.name)
        for name, (bucket, steppers) in loaded.items():
            try:
                network = Network(self._memory, self._kernels, self._manifest, bucket, steppers, workspace)
                self._networks[name] = network
                for stepper in steppers.values():
                    stepper.keep_compiled()
            except BackendError as error:
                if name == first.name:
                    raise
                self._leave_out(bucket, error)

    def _workspace(self, loaded: dict[str, tuple[Bucket, Steppers]], first: str) -> Any:
        """What the most demanding engine needs, without the buckets that this is too much for. Raises BackendError."""
        while True:
            needs = {name: max(s.workspace for s in steppers.values()) for name, (_, steppers) in loaded.items()}
            largest = max(needs, key=lambda name: (needs[name], name != first))
            try:
                return self._memory.device_buffer(needs[largest])
            except BackendError as error:
                if largest == first:
                    raise
                self._leave_out(loaded.pop(largest)[0], error)

    def _leave_out(self, bucket: Bucket, error: BackendError) -> None:
        self._failed[bucket.name] = error
        log.warning("%s is left out: %s", bucket.name, error)

    def _load(self, bucket: Bucket) -> Steppers:
        return {stage: self._stepper(bucket, stage) for stage in STAGES}

    def _stepper(self, bucket: Bucket, stage: Stage) -> Stepper:
        record = select_engine(
            self._directory,
            self._manifest,
            stage,
            bucket,
            library=self._library,
            version=str(self._trt.__version__),
            architecture=self._architecture,
        )
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
