"""Deliberate faults of the tensorrt backend, one a name. A run with one must end with failures or problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.runtime.backends.cuda_memory import Memory, Piece, Staging
from densegeo.runtime.backends.cuda_weights import Slots
from densegeo.runtime.backends.tensorrt_network import Network


def no_wait_before_reuse() -> None:
    """The pinned buffer is written while its last copy may still be under way."""

    def take(self: Staging, size: int) -> None:
        if self._buffer.size < size:
            self._buffer = self._memory.pinned_buffer(size)

    Staging._take = take  # type: ignore[method-assign]


def no_wait_before_read() -> None:
    """The pinned buffer is read before the copy into it has ended."""

    def download(self: Staging, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        real, event = self._memory.record, SimpleNamespace(sync=lambda: None)
        self._memory.record = lambda: [real(), event][1]  # type: ignore[method-assign]
        try:
            return whole(self, pieces)
        finally:
            self._memory.record = real  # type: ignore[method-assign]

    whole = Staging.download

    Staging.download = download  # type: ignore[method-assign]


def weights_through_one_buffer() -> None:
    """Weights are read from the file into a buffer that is still being copied."""
    Slots.next = lambda self: self._buffers[0]  # type: ignore[method-assign]


def while_recording(act: Callable[[Network, Any], object]) -> None:
    """Do something in the middle of every recording; it gets the network and the recorder."""
    enqueue = Network._enqueue

    def and_act(self: Network, stream: Any) -> None:
        enqueue(self, stream)
        if stream is not self._memory.stream:
            act(self, stream)

    Network._enqueue = and_act  # type: ignore[method-assign]


def allocate_while_recording() -> None:
    """Pinned memory is allocated by the thread that records."""
    while_recording(lambda network, recorder: network._memory.pinned_buffer(1))


def synchronise_while_recording() -> None:
    """The recorded stream is waited for."""
    while_recording(lambda network, recorder: recorder.stream.sync())


def free_while_recording() -> None:
    """Memory from outside the recording is freed in its order."""
    while_recording(lambda network, recorder: network._memory.device_buffer(1).close(recorder.stream))


def reuse_under_a_reader() -> None:
    """A result's memory is handed out again although another stream still reads it."""

    def free(self: Memory, buffer: Any, readers: set[int], anywhere: bool) -> bool:
        buffer.close(self.stream)
        return True

    Memory._free = free  # type: ignore[method-assign]


MUTATIONS = {
    "no-wait-before-reuse": no_wait_before_reuse,
    "no-wait-before-read": no_wait_before_read,
    "weights-through-one-buffer": weights_through_one_buffer,
    "allocate-while-recording": allocate_while_recording,
    "synchronise-while-recording": synchronise_while_recording,
    "free-while-recording": free_while_recording,
    "reuse-under-a-reader": reuse_under_a_reader,
}
