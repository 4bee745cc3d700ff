"""Device and pinned host memory of one GPU through cuda-core, its compute stream, and the order of other streams."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends import parse_device

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
        found = Device(int(index or 0))
        with current(found):
            return found
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


Piece = tuple[int, tuple[int, ...]]  # a device address, and the shape of what is there


class Memory:
    """Buffers of one device, its compute stream, copies in its order, and other streams before and after it.

    One call at a time; arrays over its memory may be dropped by any thread at any moment.
    """

    def __init__(self, device: Any) -> None:
        from cuda.bindings import driver
        from cuda.core import LegacyPinnedMemoryResource

        self._driver: Any = driver
        self._device, self._pinned, self.device_id = device, LegacyPinnedMemoryResource(), int(device.device_id)
        self.device = f"cuda:{self.device_id}"
        self._returned: deque[Returned] = deque()
        self._closed = False
        with self.current():
            self.stream = device.create_stream()
        self.staging, self.landing = Staging(self), Staging(self)  # on the way there, and back

    @contextmanager
    def current(self) -> Iterator[None]:
        """Contexts belong to threads, and buffers, events and kernels to the current one's device."""
        with current(self._device):
            yield

    def device_buffer(self, size: int) -> Any:
        """`size` bytes on the device. Raises BackendError."""
        with self.current():
            self.reclaim()
            try:
                return self._device.allocate(max(size, 1), stream=self.stream)
            except Exception as error:  # cuda-core's errors have no common base
                raise BackendError(f"{self.device} gives no {size / 1e6:.0f} MB: {error}") from error

    def pinned_buffer(self, size: int) -> Any:
        """`size` bytes of pinned host memory. Raises BackendError."""
        with self.current():
            try:
                return self._pinned.allocate(max(size, 1))
            except Exception as error:
                raise BackendError(f"the host gives no {size / 1e6:.0f} MB of pinned memory: {error}") from error

    def to_device(self, target: int, source: Any, size: int) -> None:
        """Copy from a pinned buffer to a device address, asynchronously."""
        check(self._driver.cuMemcpyHtoDAsync(target, int(source.handle), size, self.stream.handle))

    def to_host(self, target: Any, source: int, size: int, offset: int = 0) -> None:
        """Copy from a device address into a pinned buffer, asynchronously."""
        check(self._driver.cuMemcpyDtoHAsync(int(target.handle) + offset, source, size, self.stream.handle))

    def record(self) -> Any:
        """An event after all that was enqueued so far."""
        with self.current():
            return self.stream.record()

    def graph(self, work: Callable[[Any], None]) -> Any:
        """What `work(stream)` enqueues, as a CUDA graph.

        Recorded on a stream of its own, so that no other thread's call can end up in it; and ended whatever happens:
        a stream that is left recording refuses all further work.
        """
        builder = self._device.create_graph_builder()
        try:
            builder.begin_building("thread_local")
            work(builder)
            return builder.end_building().complete()
        finally:
            with suppress(Exception):  # closing a recording that failed says so again
                builder.close()

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
        """Free what was given back, in the order of the compute stream and after whoever reads it."""
        kept: list[Returned] = []
        with self.current():
            while self._returned:
                returned = self._returned.popleft()
                if not self._free(*returned):
                    kept.append(returned)
        self._returned.extend(kept)

    def close(self) -> None:
        """Nothing is allocated any more; arrays that are still held free their memory when they are dropped."""
        self._closed = True
        self.reclaim()

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
        return True


class Staging:
    """A pinned buffer between host and device: it grows, and is touched when its last copy has ended."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._buffer = memory, memory.pinned_buffer(1)
        self._copied: Any = None

    def upload(self, data: NDArray[np.uint8], target: int) -> None:
        """Copy host bytes to a device address; they may be overwritten at once."""
        self._take(data.size)
        host_view(self._buffer, data.size)[:] = data
        self._memory.to_device(target, self._buffer, data.size)
        self._copied = self._memory.record()

    def download(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        """float32 at device addresses, as arrays of their own on the host, after all that was enqueued so far.

        The copies are enqueued together and waited for once.
        """
        ends = np.cumsum([0, *(4 * int(np.prod(shape)) for _, shape in pieces)]).tolist()
        self._take(ends[-1])
        for (source, _), first, last in zip(pieces, ends[:-1], ends[1:], strict=True):
            self._memory.to_host(self._buffer, source, last - first, first)
        self._memory.record().sync()
        self._memory.staging.forget()  # uploads before it have ended too
        whole = host_view(self._buffer, ends[-1]).view(np.float32)
        spans = zip(pieces, ends[:-1], ends[1:], strict=True)
        return [whole[first // 4 : last // 4].reshape(shape).copy() for (_, shape), first, last in spans]

    def reserve(self, size: int) -> None:
        """From now on it has room for so many bytes. Raises BackendError."""
        self._take(size)

    def wait(self) -> None:
        """Until the last copy has ended."""
        if self._copied is not None:
            self._copied.sync()
            self._copied = None

    def forget(self) -> None:
        """Its last copy has ended."""
        self._copied = None

    def _take(self, size: int) -> None:
        self.wait()
        if self._buffer.size < size:
            self._buffer = self._memory.pinned_buffer(size)


def host_view(buffer: Any, size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of a pinned buffer as an array that shares its memory."""
    pointer = ctypes.cast(int(buffer.handle), ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, shape=(size,))


def check(result: tuple[Any, ...]) -> Any:
    """The value of a call of the driver. Raises BackendError when it failed."""
    if int(result[0]) != 0:
        raise BackendError(f"CUDA reports {result[0]}")
    return result[1] if len(result) > 1 else None
