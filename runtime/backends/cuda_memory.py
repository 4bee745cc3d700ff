"""Device and pinned host memory of one GPU through cuda-core, its three streams, and the order of other streams."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends import parse_device
from densegeo.runtime.backends.sharing import require_priority

Returned = tuple[Any, "set[int]", bool]  # a buffer, the streams that read it, whether unknown ones do


def open_device(device: str) -> Any:
    """The cuda-core device of "auto", "cuda" or "cuda:N". Raises BackendError where there is none.

    libcuda.so.1 is looked for first: without a driver some calls of cuda-core never return.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        raise BackendError("TensorRT runs on NVIDIA GPUs only; choose another backend for the CPU.")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BackendError("There is no NVIDIA driver here (libcuda.so.1 cannot be loaded).") from None
    try:
        from cuda.core import Device
    except ImportError:
        raise BackendError("TensorRT engines need cuda-core: pip install cuda-core cuda-bindings") from None
    try:
        opened = Device(int(index or 0))
        with current(opened):
            return opened
    except Exception as error:  # the driver's errors have no common base
        raise BackendError(f"CUDA device {index or 0} cannot be used: {error}") from error


def architecture_of(device: Any) -> int:
    """89 for compute capability 8.9."""
    capability = device.compute_capability
    return int(10 * capability.major + capability.minor)


@contextmanager
def current(device: Any) -> Iterator[None]:
    """The device is the thread's current one in this block. What the caller had chosen is so again afterwards."""
    from cuda.bindings import driver

    check(driver.cuInit(0))
    before = check(driver.cuCtxGetCurrent())
    device.set_current()
    try:
        yield
    finally:
        check(driver.cuCtxSetCurrent(before))


# Lifetimes across streams. Work on a GPU is queued: when Python's last reference to an array goes, kernels that read
# its memory may not have begun. Whoever gets that memory next must come after them, on whatever stream they are.
# - Work of our own has a stream each way: copies in, networks, copies out. Events order them; memory that is allocated
#   and freed in the order of the stream for work is safe among all that runs there.
# - An array that leaves us is read on streams that we do not own. DLPack names the reader's stream, and `Lease` notes
#   it. A pointer or `__cuda_array_interface__` names none: then only the end of all work on the device is late enough.
# - An array can be dropped in any thread at any moment: by a garbage collection, while another thread records a graph,
#   in which waiting and freeing are forbidden, or while a lock is held. So dropping does nothing but note the buffer
#   (`give_back`), and `reclaim` frees it at the beginning of a later call, where no lock is held and waiting is
#   allowed. What a stream that is just being recorded reads stays for the time after.
# - Our streams outlive `close` until the last array is back, for its memory is freed on one of them.
class Memory:
    """Buffers of one device; streams for copies there, for work and for copies back; other streams before and after.

    Threads may share it. Arrays over its memory may be dropped by any thread at any moment.
    """

    def __init__(self, device: Any, priority: int = 0) -> None:
        """priority: of its streams, as CUDA counts: 0 is the last, negative ones go before. Raises ConfigError."""
        from cuda.bindings import driver
        from cuda.core import LegacyPinnedMemoryResource, StreamOptions

        self._driver: Any = driver
        self._device, self._pinned, self.device_id = device, LegacyPinnedMemoryResource(), int(device.device_id)
        self.device = f"cuda:{self.device_id}"
        self._returned: deque[Returned] = deque()
        self._reclaiming = threading.Lock()
        self._lent = self._freed = 0  # buffers of arrays that are others'
        self._closed = False
        with self.current():
            self._check_priority(priority)
            self._options = StreamOptions(priority=priority)
            self.copying_in, self.stream, self.copying_out = (self._stream() for _ in range(3))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Contexts belong to threads, and buffers, events and kernels to the current one's device."""
        with current(self._device):
            yield

    def device_buffer(self, size: int, stream: Any = None) -> Any:
        """`size` bytes on the device, in the order of a stream of this memory: the one for work, if none is named.

        Raises BackendError.
        """
        with self.current():
            try:
                return self._device.allocate(max(size, 1), stream=stream or self.stream)
            except Exception as error:  # cuda-core's errors have no common base
                raise BackendError(f"{self.device} gives no {size / 1e6:.0f} MB: {error}") from error

    def pinned_buffer(self, size: int) -> Any:
        """`size` bytes of pinned host memory. Raises BackendError."""
        with self.current():
            try:
                return self._pinned.allocate(max(size, 1))
            except Exception as error:
                raise BackendError(f"the host gives no {size / 1e6:.0f} MB of pinned memory: {error}") from error

    def to_device(self, target: int, source: Any, size: int, stream: Any = None) -> None:
        """Copy from a pinned buffer to a device address, asynchronously, on the stream for work if none is named."""
        check(self._driver.cuMemcpyHtoDAsync(target, int(source.handle), size, (stream or self.stream).handle))

    def to_host(self, target: Any, source: int, size: int, stream: Any = None) -> None:
        """Copy from a device address into a pinned buffer, asynchronously, on the stream for work if none is named."""
        check(self._driver.cuMemcpyDtoHAsync(int(target.handle), source, size, (stream or self.stream).handle))

    def clear(self, target: int, size: int) -> None:
        """Zeros at a device address, in the order of the stream for work."""
        check(self._driver.cuMemsetD8Async(target, 0, size, self.stream.handle))

    def record(self, stream: Any = None, event: Any = None) -> Any:
        """An event after all that a stream was given so far: the one for work, if none is named. event: used again."""
        with self.current():
            return (stream or self.stream).record(event)

    def graph(self, work: Callable[[Any], None]) -> Any:
        """What `work(stream)` enqueues, as a CUDA graph.

        Recorded on a stream of its own, so that no other thread's call can end up in it; and ended whatever happens:
        a stream that is left recording refuses all further work.
        """
        stream = self._stream()  # a recording has the priority of the stream that it is made on
        builder = stream.create_graph_builder()
        try:
            builder.begin_building("thread_local")
            work(builder)
            return builder.end_building().complete()
        finally:
            with suppress(Exception):  # closing a recording that failed says so again
                builder.close()
            stream.close()

    def _stream(self) -> Any:
        return self._device.create_stream(options=self._options)

    def wait_for(self, stream: int) -> None:
        """The compute stream goes on after what another one (its handle) has been given so far."""
        with self.current():
            event = check(self._driver.cuEventCreate(0))
            try:
                check(self._driver.cuEventRecord(event, stream))
                check(self._driver.cuStreamWaitEvent(self.stream.handle, event, 0))
            finally:
                check(self._driver.cuEventDestroy(event))

    def let_wait(self, stream: int, event: Any) -> None:
        """Another stream (its handle) goes on after an event of `record`."""
        with self.current():
            check(self._driver.cuStreamWaitEvent(stream, event.handle, 0))

    def wait_for_device(self) -> None:
        """Wait on the host for all streams of the device."""
        with self.current():
            check(self._driver.cuCtxSynchronize())

    def give_back(self, buffer: Any, readers: set[int], anywhere: bool) -> None:
        """Free a buffer later, after its readers' streams: from any thread, also while something is recorded."""
        self._returned.append((buffer, readers, anywhere))
        if self._closed and not sys.is_finalizing():
            self.reclaim()

    def reclaim(self) -> None:
        """Free what was given back, in the order of the compute stream and after whoever reads it.

        It may wait for the device: call it while holding no lock. Nobody waits for another thread that does the same.
        """
        if not self._returned or not self._reclaiming.acquire(blocking=False):
            return
        postponed: list[Returned] = []
        try:
            with self.current():
                while self._returned:
                    returned = self._returned.popleft()
                    if not self._free(*returned):
                        postponed.append(returned)
            self._end()
        finally:
            self._returned.extend(postponed)
            self._reclaiming.release()

    def lend(self) -> None:
        """One of its buffers goes to others, who give it back."""
        self._lent += 1

    def close(self) -> None:
        """Nothing is allocated any more. Arrays that are still held free their memory when they are dropped, and the
        streams end with the last of them.
        """
        self._closed = True
        self.reclaim()
        with self.current():
            self._end()

    def _end(self) -> None:
        if self._closed and self._lent == self._freed:
            for stream in (self.copying_in, self.stream, self.copying_out):
                stream.close()

    def _check_priority(self, priority: int) -> None:
        status, last, first = self._driver.cuCtxGetStreamPriorityRange()
        check((status,))
        require_priority(priority, first, last, self.device)

    def _free(self, buffer: Any, readers: set[int], anywhere: bool) -> bool:
        """False: not now, a reader's stream is being recorded, and waiting for it would become part of that."""
        if any(check(self._driver.cuStreamIsCapturing(stream)) for stream in readers):
            return False
        try:
            for stream in readers:
                self.wait_for(stream)
        except BackendError:  # the stream is gone
            anywhere = True
        if anywhere:
            self.wait_for_device()
        buffer.close(self.stream)
        self._freed += 1
        return True


def host_view(buffer: Any, size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of a pinned buffer as an array that shares its memory."""
    pointer = ctypes.cast(int(buffer.handle), ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, shape=(size,))


def check(result: tuple[Any, ...]) -> Any:
    """The value of a call of the driver. Raises BackendError when it failed."""
    if int(result[0]) != 0:
        raise BackendError(f"CUDA reports {result[0]}")
    return result[1] if len(result) > 1 else None
