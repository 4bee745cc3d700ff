"""Images between host and device: pinned buffers in a ring, copies on streams of their own.

While one thread waits for its result, another's image is copied in and launched: the copies of image n + 1 overlap the
networks of image n. On a CPU the same code runs without pinning and streams.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from densegeo.errors import BackendError
from densegeo.outputs import Maps
from densegeo.runtime.backends import dlpack, require_device
from densegeo.runtime.backends.cuda_array import LEGACY
from densegeo.runtime.backends.sharing import require_priority

RING = 2  # images in flight: one computes while the other is copied

Results = Maps[Tensor]  # of one image


class Ring:
    """`RING` slots for groups of images in flight on one device, and the streams they share."""

    def __init__(self, device: str, priority: int = 0) -> None:
        """priority: of the streams, see `sharing.Sharing`. Raises ConfigError for one that the device has not."""
        self.device = device
        self._cuda, self._device = device != "cpu", torch.device(device)
        if priority and self._cuda:
            streams: Any = torch.cuda.Stream
            last, first = streams.priority_range()  # static
            require_priority(priority, first, last, device)
        self._streams = [torch.cuda.Stream(device, priority=priority) if self._cuda else None for _ in range(3)]
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._launching = threading.Lock()
        for _ in range(RING):
            self._free.put(Slot(device))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Work launched in this block goes to the compute stream, one thread at a time."""
        with self._launching, self._on(1):
            yield

    def run(
        self, pixels: Sequence[NDArray[np.uint8]], compute: Callable[[list[Tensor]], Sequence[Results]]
    ) -> list[Maps[NDArray[np.float32]]]:
        """Copy images in, launch `compute(tensors on the device)`, wait, and return copies of its results."""
        slot = self._free.get()
        try:
            with self._on(0):
                frames = slot.upload(pixels)
                copied = self._event()
            with self.computing():
                self._wait(copied)
                results = compute(frames)
                computed = self._event()
            with self._on(2):
                self._wait(computed)
                buffers = slot.download(results)
                done = self._event()
            if done is not None:
                done.synchronize()
            return [Maps(**{name: buffer.numpy().copy() for name, buffer in group.items()}) for group in buffers]
        except BaseException:
            if self._cuda:
                torch.cuda.synchronize(self._device)  # nothing may still use the slot when the next image takes it
            raise
        finally:
            self._free.put(slot)

    def keep(self, image: Any, compute: Callable[[Tensor], Results]) -> Results:
        """`compute` on an array that is or goes to the device; its results stay there, ready for the caller's stream.

        image: see `frame_of`. It is read after the work of the caller's current stream, and work that this stream is
        given afterwards may overwrite it; so may anybody where it was no tensor of this device. Raises BackendError.
        """
        arrived = self._event()
        with self._on(0):
            self._wait(arrived)
            frame = frame_of(image, self._device)
            copied = self._event()
            if copied is not None and frame is not image:
                copied.synchronize()  # whoever made it knows nothing of our streams
        with self.computing():
            self._wait(copied)
            self._reads(frame)
            results = compute(frame)
            computed = self._event()
        self._wait(computed)
        for result in results.named().values():
            self._reads(result)
        return results

    def _reads(self, tensor: Tensor) -> None:
        """The current stream reads it: its memory is used again only after that (torch's `Tensor.record_stream`)."""
        if self._cuda:
            tensor.record_stream(torch.cuda.current_stream(self._device))

    def _on(self, index: int) -> Any:
        return torch.cuda.stream(self._streams[index]) if self._cuda else nullcontext()

    def _event(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event() if self._cuda else None

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def frame_of(image: Any, device: torch.device) -> Tensor:
    """A tensor of this device as it is, if a pixel's channels are adjacent, and anything else as a copy there, on the
    current stream and behind the work of whoever made it.

    image: a tensor, or anything with DLPack, `__cuda_array_interface__` or `__array__`. Raises BackendError for memory
    of another CUDA device.
    """
    if isinstance(image, Tensor):
        if image.is_cuda:
            require_device(str(image.device), str(device))
        there = image.to(device)
        return there if there.stride(-1) == 1 else there.contiguous()
    if isinstance(image, np.ndarray) or not hasattr(image, "__dlpack__"):
        return _from_interface(image, device)
    kind, index = image.__dlpack_device__()
    if kind == dlpack.CUDA:  # managed memory belongs to all devices
        require_device(f"cuda:{index}", str(device))
    # torch names its current stream to the producer, which makes that wait (Python array API, `__dlpack__`)
    return torch.utils.dlpack.from_dlpack(image).to(device, copy=True).contiguous()


def _from_interface(image: Any, device: torch.device) -> Tensor:
    """A copy of a host array, or of what `__cuda_array_interface__` describes."""
    described = getattr(image, "__cuda_array_interface__", None)
    if described is None:
        return torch.tensor(np.ascontiguousarray(image), device=device)
    _wait_for_producer(described.get("stream"), device)
    tensor = torch.as_tensor(image, device=device)
    if tensor.data_ptr() != described["data"][0]:  # torch copies from another device, and says nothing
        raise BackendError(f"The image does not lie on {device}, where this estimator runs: move it there.")
    return tensor.clone(memory_format=torch.contiguous_format)


def _wait_for_producer(stream: int | None, device: torch.device) -> None:
    """The interface's version 3 names the producer's stream: 1 is the legacy default one, 2 the thread's own. Where it
    does not, nobody knows what is still to come: wait for all.
    """
    if not stream:
        torch.cuda.synchronize(device)
        return
    by_handle = torch.cuda.ExternalStream  # which takes every handle but the legacy default stream's
    produced = torch.cuda.default_stream(device) if stream == LEGACY else by_handle(stream, device)
    torch.cuda.current_stream(device).wait_stream(produced)


class Slot:
    """The buffers of one group of images in flight; they grow to the largest group seen."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._host_in = torch.empty(0, dtype=torch.uint8)
        self._device_in = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._host_out = torch.empty(0)

    def upload(self, pixels: Sequence[NDArray[np.uint8]]) -> list[Tensor]:
        """Images (h, w, 3) -> the same on the device, in one copy on the current stream."""
        sizes = [image.size for image in pixels]
        total = sum(sizes)
        if self._host_in.numel() < total:
            self._host_in = self._pinned(total, torch.uint8)
            self._device_in = torch.empty(total, dtype=torch.uint8, device=self._device)
        for part, image in zip(self._host_in[:total].split(sizes), pixels, strict=True):
            np.copyto(part.view(image.shape).numpy(), image)
        there = self._device_in[:total].copy_(self._host_in[:total], non_blocking=True).split(sizes)
        return [part.view(image.shape) for part, image in zip(there, pixels, strict=True)]

    def download(self, results: Sequence[Results]) -> list[dict[str, Tensor]]:
        """Float32 tensors of the device -> views of the pinned buffer, on the current stream."""
        self._results = results  # their memory must outlive the copy
        sizes = [result.numel() for group in results for result in group.named().values()]
        total = sum(sizes)
        if self._host_out.numel() < total:
            self._host_out = self._pinned(total, torch.float32)
        parts = iter(self._host_out[:total].split(sizes))
        return [
            {
                name: next(parts).view(result.shape).copy_(result, non_blocking=True)
                for name, result in group.named().items()
            }
            for group in results
        ]

    def _pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
