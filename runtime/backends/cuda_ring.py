"""Calls in flight on one device: memory for each, and copies on streams of their own.

While one thread waits for its maps, another's images are copied in and its networks are launched: the copies of frame
n + 1 there and of frame n - 1 back run under the networks of frame n. No lock is held while somebody waits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends.cuda_input import Pixels
from densegeo.runtime.backends.cuda_memory import Memory, host_view
from densegeo.runtime.backends.cuda_weights import aligned

RING = 2  # calls in flight: one computes while the other is copied
FLOAT = 4  # bytes
Shape = tuple[int, ...]


class Ring:
    """`RING` slots for calls in flight, and the one lock that whoever launches holds. Raises BackendError."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.launching = threading.Lock()
        self._slots = [Slot(memory, self.launching) for _ in range(RING)]
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A slot for this block alone, once one is free, with the device as the thread's current one."""
        slot = self._free.get()
        try:
            with self.memory.current():
                try:
                    yield slot
                except BaseException:
                    with suppress(BackendError):  # what went wrong first is what is told
                        self.memory.wait_for_device()  # nothing may still use the slot when the next call takes it
                    raise
        finally:
            self._free.put(slot)

    def reserve(self, images: Sequence[int], maps: Sequence[Shape]) -> None:
        """Every slot has room for images of so many bytes and for float32 maps of these shapes. Raises BackendError."""
        for slot in self._slots:
            slot.reserve(images, maps)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """No call is in flight in this block; its memory is released after it."""
        slots = [self._free.get() for _ in self._slots]
        try:
            with self.memory.current():
                yield
                for slot in slots:
                    slot.close()
        finally:
            for slot in slots:
                self._free.put(slot)


class Slot:
    """Memory of one call in flight, pinned and on the device. It grows to the largest call seen."""

    def __init__(self, memory: Memory, launching: threading.Lock) -> None:
        self._memory, self._launching = memory, launching
        self._pinned_in, self._frames = memory.pinned_buffer(1), memory.device_buffer(1, memory.copying_in)
        self._maps, self._pinned_out = memory.device_buffer(1), memory.pinned_buffer(1)
        self._copied, self._computed, self._done = (memory.record() for _ in range(3))  # events, recorded again
        self._shapes: list[Shape] = []  # of what comes back
        self._starts = [0]  # of each in the slot's memory, in bytes, and the end of all

    def reserve(self, images: Sequence[int], maps: Sequence[Shape]) -> None:
        """Room for images of so many bytes and for float32 maps of these shapes. Raises BackendError."""
        self._make_room(starts(images)[-1])
        self.room(maps)

    def upload(self, images: Sequence[NDArray[np.uint8]]) -> list[Pixels]:
        """Images in C order -> the same on the device, in one copy on a stream of its own.

        They may be overwritten when this returns.
        """
        places = starts([image.size for image in images])
        self._make_room(places[-1])
        pinned = host_view(self._pinned_in, places[-1])
        for image, place in zip(images, places, strict=False):
            pinned[place : place + image.size] = image.reshape(-1)
        stream = self._memory.copying_in
        self._memory.to_device(int(self._frames.handle), self._pinned_in, places[-1], stream)
        self._memory.record(stream, self._copied)
        return [
            Pixels(int(self._frames.handle) + place, (image.strides[0], image.strides[1]), self._frames)
            for image, place in zip(images, places, strict=False)
        ]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What is enqueued for the stream for work in this block comes after the uploads and before `download`.

        One thread at a time.
        """
        with self._launching:
            self._memory.stream.wait(self._copied)
            yield
            self._memory.record(event=self._computed)

    def room(self, shapes: Sequence[Shape]) -> list[int]:
        """Addresses for float32 maps of these shapes, which `download` brings back. Raises BackendError."""
        self._shapes, self._starts = list(shapes), starts([FLOAT * int(np.prod(shape)) for shape in shapes])
        if self._maps.size < self._starts[-1]:
            self._maps = self._memory.device_buffer(self._starts[-1])
        self._take(self._starts[-1])
        return [int(self._maps.handle) + start for start in self._starts[:-1]]

    def download(self) -> list[NDArray[np.float32]]:
        """The maps of `room`, arrays of their own, in one copy that waits for this slot's work and for no other."""
        stream = self._memory.copying_out
        stream.wait(self._computed)
        self._memory.to_host(self._pinned_out, int(self._maps.handle), self._starts[-1], stream)
        self._memory.record(stream, self._done)
        return self.results()

    def put(self, data: NDArray[Any], target: int) -> None:
        """Copy an array into a buffer of the network's, in the order of the stream for work."""
        self._make_room(data.nbytes)
        host_view(self._pinned_in, data.nbytes)[:] = data.reshape(-1).view(np.uint8)
        self._memory.to_device(target, self._pinned_in, data.nbytes)

    def fetch(self, source: int, shape: Shape) -> None:
        """`results` are float32 of a network's buffer, copied in the order of the stream for work."""
        self._shapes, self._starts = [shape], [0, FLOAT * int(np.prod(shape))]
        self._take(self._starts[-1])
        self._memory.to_host(self._pinned_out, source, self._starts[-1])
        self._memory.record(event=self._done)

    def results(self) -> list[NDArray[np.float32]]:
        """What is on its way to the host, once it is there. The only wait of a call."""
        self._done.sync()
        floats = host_view(self._pinned_out, self._starts[-1]).view(np.float32)
        places = zip(self._starts, self._shapes, strict=False)
        return [floats[start // FLOAT :][: int(np.prod(shape))].reshape(shape).copy() for start, shape in places]

    def close(self) -> None:
        """Release its memory."""
        for buffer in (self._pinned_in, self._frames, self._maps, self._pinned_out):
            buffer.close()
        for event in (self._copied, self._computed, self._done):
            event.close()

    def _make_room(self, size: int) -> None:
        """For images; nothing is under way."""
        if self._pinned_in.size < size:
            self._pinned_in = self._memory.pinned_buffer(size)
        if self._frames.size < size:
            self._frames = self._memory.device_buffer(size, self._memory.copying_in)

    def _take(self, size: int) -> None:
        if self._pinned_out.size < size:
            self._pinned_out = self._memory.pinned_buffer(size)


def starts(sizes: Sequence[int]) -> list[int]:
    """Bytes of each -> where each starts, aligned for the device, and the end of all."""
    return [0, *np.cumsum([aligned(size) for size in sizes]).tolist()]
