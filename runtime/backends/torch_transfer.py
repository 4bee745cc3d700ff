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

RING = 2  # images in flight: one computes while the other is copied

Results = tuple[Tensor, ...]  # of one image, float32


class Ring:
    """`RING` slots for groups of images in flight on one device, and the streams they share."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._cuda, self._device = device != "cpu", torch.device(device)
        self._streams = [torch.cuda.Stream(device) if self._cuda else None for _ in range(3)]
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
    ) -> list[tuple[NDArray[np.float32], ...]]:
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
            return [tuple(buffer.numpy().copy() for buffer in group) for group in buffers]
        except BaseException:
            if self._cuda:
                torch.cuda.synchronize()  # nothing may still use the slot when the next image takes it
            raise
        finally:
            self._free.put(slot)

    def keep(self, image: Any, compute: Callable[[Tensor], Results]) -> Results:
        """`compute` on an array that is or goes to the device; its results stay there, ready for the caller's stream.

        image: a tensor, or anything with DLPack or `__cuda_array_interface__`.
        """
        with self.computing():
            results = compute(as_tensor(image).to(self._device))
            computed = self._event()
        self._wait(computed)
        if self._cuda:
            for result in results:
                result.record_stream(torch.cuda.current_stream(self._device))
        return results

    def _on(self, index: int) -> Any:
        return torch.cuda.stream(self._streams[index]) if self._cuda else nullcontext()

    def _event(self) -> Any:
        return torch.cuda.current_stream().record_event() if self._cuda else None

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


def as_tensor(image: Any) -> Tensor:
    """The same memory as a tensor, ready for the current stream. Raises TypeError, BufferError for what is no array."""
    if isinstance(image, Tensor):
        return image
    if hasattr(image, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(image)
    return torch.as_tensor(image, device="cuda")


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

    def download(self, results: Sequence[Results]) -> list[tuple[Tensor, ...]]:
        """Float32 tensors of the device -> views of the pinned buffer, on the current stream."""
        self._results = results  # their memory must outlive the copy
        sizes = [result.numel() for group in results for result in group]
        total = sum(sizes)
        if self._host_out.numel() < total:
            self._host_out = self._pinned(total, torch.float32)
        parts = iter(self._host_out[:total].split(sizes))
        return [
            tuple(next(parts).view(result.shape).copy_(result, non_blocking=True) for result in group)
            for group in results
        ]

    def _pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
