"""Arrays that stay on the device, and whoever else reads them: DLPack and `__cuda_array_interface__`."""

from __future__ import annotations

from typing import Any

import numpy as np

from densegeo.runtime.backends import dlpack
from densegeo.runtime.backends.cuda_memory import Memory

LEGACY = 1  # the legacy default stream, as DLPack and CUDA number it
PER_THREAD = 2  # which stream that is depends on the thread that asks


class Lease:
    """A device buffer that others may read. It goes back when nobody holds it, and is reused after all readers."""

    def __init__(self, memory: Memory, buffer: Any) -> None:
        self._memory, self._buffer = memory, buffer
        memory.lend()
        self._readers: set[int] = set()  # handles of streams
        self._anywhere = False  # read on a stream that is not known

    def read_on(self, stream: int | None) -> None:
        """Somebody reads it on this stream from now on; None: on any."""
        if stream is None or stream == PER_THREAD:
            self._anywhere = True
        else:
            self._readers.add(stream)

    def __del__(self) -> None:
        self._memory.give_back(self._buffer, self._readers, self._anywhere)


class DeviceArray:
    """A float32 array on the device, ready for the stream that asks for it. Not to be written.

    DLPack (`torch.from_dlpack(result)`) names the reader's stream, so nothing waits on the host. Through
    `__cuda_array_interface__` and `pointer` the reader's stream is unknown: they wait on the host until the result is
    there, and the memory's next use waits for the whole device.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, memory: Memory, buffer: Any, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.address = int(buffer.handle)  # for work on the memory's own stream
        self._memory, self._lease = memory, Lease(memory, buffer)
        self._ready: Any = None

    def ready_after(self, event: Any) -> None:
        """It holds its result after this event of `Memory.record`; other streams and the host wait for that."""
        self._ready = event

    @property
    def pointer(self) -> int:
        """The address, once the result is there."""
        self._lease.read_on(None)
        if self._ready is not None:
            self._ready.sync()
        return self.address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # stream None: whoever takes it need not wait (version 3)
        described = {"shape": self.shape, "typestr": "<f4", "data": (self.pointer, False), "strides": None}
        return {**described, "stream": None, "version": 3}

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._memory.device_id

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule for work on `stream`: a handle, 1 or None for the legacy default stream, 2 for the per-thread
        one, -1 for a reader that orders itself (Python array API, `__dlpack__`). Raises BufferError.
        """
        if dl_device not in (None, self.__dlpack_device__()) or copy:
            raise BufferError("This array can be read where it is, and neither moved nor copied: copy it yourself.")
        if stream == 0:
            raise BufferError("Stream 0 is ambiguous in DLPack: say 1 for the legacy default stream.")
        stream = LEGACY if stream is None else stream
        if stream == -1:
            self._lease.read_on(None)
        else:
            self._lease.read_on(stream)
            if self._ready is not None:
                self._memory.let_wait(stream, self._ready)
        return dlpack.capsule(self.address, self.shape, "f", 32, self._memory.device_id, self._lease)
