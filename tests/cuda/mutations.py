"""Deliberate faults of the tensorrt backend, one a name. A run with one must end with failures or problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.runtime.backends.cuda_memory import Memory
from densegeo.runtime.backends.cuda_ring import Ring, Slot
from densegeo.runtime.backends.cuda_weights import Halves
from densegeo.runtime.backends.tensorrt_network import Network


def slot_before_its_copies_end() -> None:
    """A slot is taken again while the last call's copies may still be under way."""

    def results(self: Slot) -> list[NDArray[np.float32]]:
        done, self._done = self._done, SimpleNamespace(sync=lambda: None)
        try:
            return whole(self)
        finally:
            self._done = done

    whole = Slot.results
    Slot.results = results  # type: ignore[method-assign]


def work_before_its_images() -> None:
    """The networks do not wait for the copy of their images."""

    @contextmanager
    def computing(self: Slot) -> Iterator[None]:
        with self._launching:
            yield
            self._memory.record(event=self._computed)

    Slot.computing = computing  # type: ignore[method-assign]


def maps_before_their_work() -> None:
    """Maps are copied without waiting for the networks that make them."""

    @contextmanager
    def computing(self: Slot) -> Iterator[None]:
        with self._launching:
            self._memory.stream.wait(self._copied)
            self._memory.record(event=self._computed)
            yield

    Slot.computing = computing  # type: ignore[method-assign]


def one_slot_for_all() -> None:
    """Calls in flight share one slot."""

    @contextmanager
    def slot(self: Ring) -> Iterator[Slot]:
        with self.memory.current():
            yield self._slots[0]

    Ring.slot = slot  # type: ignore[method-assign]


def one_stream() -> None:
    """Copies take their turn among the networks."""

    def start(self: Memory, *given: Any) -> None:
        whole(self, *given)
        self.copying_in = self.copying_out = self.stream

    whole = Memory.__init__
    Memory.__init__ = start  # type: ignore[method-assign]


def lock_held_while_waiting() -> None:
    """The lock of whoever launches is held until the maps are there."""

    def results(self: Slot) -> list[NDArray[np.float32]]:
        with self._launching:
            return whole(self)

    whole = Slot.results
    Slot.results = results  # type: ignore[method-assign]


def weights_through_one_buffer() -> None:
    """Weights are read from the file into a buffer that is still being copied."""
    Halves.next = lambda self: self._buffers[0]  # type: ignore[method-assign]


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
    "slot-before-its-copies-end": slot_before_its_copies_end,
    "work-before-its-images": work_before_its_images,
    "maps-before-their-work": maps_before_their_work,
    "one-slot-for-all": one_slot_for_all,
    "one-stream": one_stream,
    "lock-held-while-waiting": lock_held_while_waiting,
    "weights-through-one-buffer": weights_through_one_buffer,
    "allocate-while-recording": allocate_while_recording,
    "synchronise-while-recording": synchronise_while_recording,
    "free-while-recording": free_while_recording,
    "reuse-under-a-reader": reuse_under_a_reader,
}
