"""Networks on an NVIDIA GPU between our kernels, without torch: whole images in, maps out, whoever runs the networks.

A subclass says how a bucket's networks are loaded: as TensorRT engines, or as ONNX Runtime's sessions.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.colors import Color
from densegeo.errors import BackendError
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.outputs import Maps
from densegeo.runtime.backends.cuda_array import DeviceArray
from densegeo.runtime.backends.cuda_input import pixels_of
from densegeo.runtime.backends.cuda_kernels import Kernels
from densegeo.runtime.backends.cuda_memory import Memory, architecture_of
from densegeo.runtime.backends.cuda_ring import Ring, Slot
from densegeo.runtime.backends.tensorrt_network import Network, Steps
from densegeo.runtime.bundle import Bucket, Manifest, Stage
from densegeo.runtime.resample import Placement, in_batches

log = logging.getLogger("densegeo")


class CudaFrames(ABC):
    """Networks of one bundle on one device. Two calls are in flight at once: the copies of one run under the other's
    networks.

    Opening pays for all that a first run costs: a request loads, allocates and records nothing but its own image's
    buffers. The first bucket must work; another one that cannot be opened is left out, with a line in the log. Without
    the one for a batch, its images run in smaller ones.
    """

    name: str
    takes_frames = True
    recording = True  # whether the networks can be recorded

    def __init__(self, directory: Path, manifest: Manifest, device: Any, priority: int) -> None:
        """device: cuda-core's. Raises BackendError, ConfigError."""
        self._directory, self._manifest = directory, manifest
        self.device = f"cuda:{device.device_id}"
        self._gpu, self._architecture = device, architecture_of(device)
        self._kernels = Kernels(directory, manifest.kernels, self._architecture)
        self._memory = Memory(device, priority)
        self._networks: dict[str, Network] = {}  # by the bucket's name
        self._failed: dict[str, BackendError] = {}  # why a bucket is not there
        self._closing, self._closed = threading.Lock(), False

    def _start(self) -> None:
        """Load and record: a subclass is ready for that. Raises BackendError."""
        with self._memory.current():
            self._ring = Ring(self._memory)
            self._open()
        self._buckets = [bucket for bucket in self._manifest.buckets if bucket.name in self._networks]
        self.frames_at_once = max(bucket.batch for bucket in self._buckets)
        self.records = all(network.recorded for network in self._networks.values())

    @abstractmethod
    def _load(self, bucket: Bucket) -> Steps:
        """A bucket's networks. Raises BackendError."""

    @abstractmethod
    def _release(self) -> None:
        """Memory of a subclass, when no call is in flight."""

    def warm_up(self, largest_group: int) -> None:  # noqa: B027
        """See `FrameBackend`: opening did all of it, since the bundle says how many images its networks take."""

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> NDArray[np.float32]:
        """Run one network, eager: (its input) -> its output. Raises BackendError."""
        with self._slot() as slot:
            network = self._network(bucket)
            with slot.computing():
                network.run(slot, stage, np.ascontiguousarray(array, dtype=np.float32))
            return slot.results()[0]

    def estimate(
        self,
        bucket: Bucket,
        pixels: Sequence[NDArray[np.uint8]],
        placements: Sequence[Placement],
        color: Color = "rgb",
    ) -> list[Maps[NDArray[np.float32]]]:
        """Pixels (h, w, 3) or YCbCr -> the maps of each, in the bundle's batches. Raises BackendError."""
        with self._slot() as slot:
            shapes = [shape for place in placements for shape in self._network(bucket).shapes(place)]
            frames = slot.upload([np.ascontiguousarray(image) for image in pixels])
            with slot.computing():
                addresses = iter(slot.room(shapes))
                for fitting, part in in_batches(self._buckets, bucket, len(pixels)):
                    network = self._network(fitting)
                    for index, (frame, placement) in enumerate(zip(frames[part], placements[part], strict=True)):
                        network.prepare(index, frame, placement, color)
                    network.launch()
                    for index, placement in enumerate(placements[part]):
                        network.maps(index, placement, addresses)
            maps = iter(slot.download())
            return [Maps(**{row.name: next(maps) for row in self._manifest.decode.outputs}) for _ in pixels]

    def keep(
        self, bucket: Bucket, image: Any, placement: Placement, color: Color, metres: Metres | None = None
    ) -> Maps[DeviceArray]:
        """The same for one image, uint8 (h, w, 3) or YCbCr on the device, where it is not copied, or on the host.

        It is read behind its producer's stream, and may be overwritten when this returns. The results stay on the
        device, ready for whichever stream takes them. Raises BackendError.
        """
        with self._slot() as slot:
            network = self._network(bucket)
            pixels = pixels_of(image, self._memory)
            if isinstance(pixels, np.ndarray):
                (pixels,) = slot.upload([pixels])
            with slot.computing():
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
        """Drop networks and buffers, once no call is in flight; results that are still held stay good."""
        with self._closing:
            if self._closed:
                return
            with self._ring.ending():
                self._closed = True
                for network in self._networks.values():
                    network.close()
                self._networks.clear()
                self._release()
                self._kernels.close()
                self._workspace.close()
            self._memory.close()

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        """A slot for one call. Raises BackendError after `close`."""
        with self._ring.slot() as slot:
            if self._closed:
                raise BackendError("This estimator is closed. Make a new Estimator.")
            self._memory.reclaim()  # it may wait for readers: before the lock that `computing` takes
            yield slot

    def _network(self, bucket: Bucket) -> Network:
        if bucket.name not in self._networks:
            raise self._failed[bucket.name]
        return self._networks[bucket.name]

    # Why one workspace, and why all engines are loaded before the first is recorded. A recording replays addresses,
    # that of its workspace among them: one that was replaced by a larger afterwards would leave the recording writing
    # into freed memory. So the largest need of all sizes and batches is known first. One workspace serves them all,
    # because their work follows on one stream; a workspace each would be held side by side for as long as the bundle is
    # open.
    def _open(self) -> None:
        """All networks first, because they share one workspace; then buffers and recordings. Raises BackendError."""
        first, *others = self._manifest.buckets
        loaded = {first.name: (first, self._load(first))}
        for bucket in others:
            try:
                loaded[bucket.name] = bucket, self._load(bucket)
            except BackendError as error:
                self._leave_out(bucket, error)
        self._workspace = self._shared_workspace(loaded, first.name)
        for name, (bucket, steppers) in loaded.items():
            try:
                network = Network(
                    self._ring, self._kernels, self._manifest, bucket, steppers, self._workspace, record=self.recording
                )
                self._networks[name] = network
                for stepper in steppers.values():
                    stepper.keep_compiled()
            except BackendError as error:
                if name == first.name:
                    raise
                self._leave_out(bucket, error)

    def _shared_workspace(self, loaded: dict[str, tuple[Bucket, Steps]], first: str) -> Any:
        """What the most demanding network needs, without the buckets that this is too much for. Raises BackendError."""
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
