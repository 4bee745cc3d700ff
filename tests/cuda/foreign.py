"""Another library on the same device: it makes images and reads results on streams of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.runtime.backends import dlpack
from densegeo.runtime.backends.cuda_memory import Memory, host_view


class Image:
    """uint8 (h, w, 3) on the device, whose copy to it is enqueued and not waited for. It has DLPack.

    offset: where it lies in its buffer.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, memory: Memory, pixels: NDArray[np.uint8], offset: int = 0) -> None:
        self.memory, self.shape = memory, pixels.shape
        self._buffer = memory.device_buffer(offset + pixels.size)
        self.address = int(self._buffer.handle) + offset
        self._pinned: list[Any] = []  # copies from it may be under way
        self.write(pixels)

    def write(self, pixels: NDArray[np.uint8]) -> None:
        """Enqueue a copy of other pixels to it."""
        pinned = self.memory.pinned_buffer(pixels.size)
        self._pinned.append(pinned)
        host_view(pinned, pixels.size)[:] = pixels.ravel()
        self.memory.to_device(self.address, pinned, pixels.size)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.memory.device_id

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if stream not in (None, -1):
            self.memory.let_wait(stream, self.memory.record())
        return dlpack.capsule(self.address, self.shape, "u", 8, self.memory.device_id, self)


class InterfaceImage:
    """The same with `__cuda_array_interface__` alone. named: it tells its stream."""

    def __init__(self, image: Image, *, named: bool) -> None:
        stream = {"stream": int(image.memory.stream.handle)} if named else {}
        data = {"shape": image.shape, "typestr": "|u1", "data": (image.address, False), "strides": None}
        self.__cuda_array_interface__ = {**data, "version": 3, **stream}
        self._image = image


class Reading:
    """A result that is copied to the host on the foreign stream, enqueued and not waited for.

    The result is let go as soon as the copy is enqueued.
    """

    def __init__(self, memory: Memory, result: Any) -> None:
        from cuda.core.utils import StridedMemoryView

        self._memory, self._shape = memory, tuple(result.shape)
        self._size = 4 * int(np.prod(self._shape))
        self._buffer = memory.pinned_buffer(self._size)
        with memory.current():
            view = StridedMemoryView.from_dlpack(result, stream_ptr=int(memory.stream.handle))
        assert (view.dtype, tuple(view.shape), view.device_id) == (np.float32, self._shape, memory.device_id)
        memory.to_host(self._buffer, view.ptr, self._size)

    def wait(self) -> NDArray[np.float32]:
        """What was read."""
        with self._memory.current():
            self._memory.stream.sync()
        return host_view(self._buffer, self._size).view(np.float32).reshape(self._shape).copy()
