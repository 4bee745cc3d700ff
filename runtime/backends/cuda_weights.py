"""Weights from a bundle's file to the device, each where TensorRT takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends.cuda_memory import Memory, host_view

ALIGNMENT = 256  # bytes; TensorRT's for the address of a tensor (NvInferRuntime.h, setTensorAddress)
STAGING = 64 << 20  # bytes of each of the two pinned buffers that weights pass through


def aligned(size: int) -> int:
    """Bytes from the start of one tensor to that of the next."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def layout(tensors: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """(offset in the file, bytes) by name -> offset on the device by name, all aligned, and bytes of all."""
    offsets, end = {}, 0
    for name, (_, size) in sorted(tensors.items(), key=lambda item: item[1]):
        offsets[name] = end
        end += aligned(size)
    return offsets, end


def upload_weights(memory: Memory, path: Path, tensors: Mapping[str, tuple[int, int]]) -> tuple[Any, dict[str, int]]:
    """(offset in the file, bytes) by name -> a device buffer, and every tensor's address in it.

    Raises BackendError.
    """
    offsets, total = layout(tensors)
    target = memory.device_buffer(total)
    pieces = [(offsets[name], *tensors[name]) for name in offsets]
    halves = Halves(memory, min(STAGING, max(total, 1)))
    with open(path, "rb") as file:
        for start in range(0, total, STAGING):
            size = min(STAGING, total - start)
            buffer = halves.next()
            fill(host_view(buffer, size), start, pieces, file)
            memory.to_device(int(target.handle) + start, buffer, size)
            halves.copied()
    halves.close()
    return target, {name: int(target.handle) + offset for name, offset in offsets.items()}


def fill(part: NDArray[np.uint8], start: int, pieces: list[tuple[int, int, int]], file: BinaryIO) -> None:
    """The bytes [start, start + size) of the device's layout; pieces: (target, in the file, bytes)."""
    for target, offset, size in pieces:
        first, last = max(target, start), min(target + size, start + part.size)
        if first < last:
            file.seek(offset + first - target)
            if file.readinto(part[first - start : last - start].data) != last - first:  # type: ignore[attr-defined]
                raise BackendError(f"{file.name} ended early: copy the bundle again")


class Halves:
    """Two pinned buffers in turn: one is filled while the other is copied."""

    def __init__(self, memory: Memory, size: int) -> None:
        self._memory, self._turn = memory, 0
        self._buffers = [memory.pinned_buffer(size) for _ in range(2)]
        self._events: list[Any] = [None, None]

    def next(self) -> Any:
        """The other buffer, once its last copy has ended."""
        self._turn ^= 1
        if self._events[self._turn] is not None:
            self._events[self._turn].sync()
        return self._buffers[self._turn]

    def copied(self) -> None:
        """The copy out of this turn's buffer is enqueued."""
        self._events[self._turn] = self._memory.record()

    def close(self) -> None:
        """Release them once both are free."""
        for event in self._events:
            if event is not None:
                event.sync()
        for buffer in self._buffers:
            buffer.close()
