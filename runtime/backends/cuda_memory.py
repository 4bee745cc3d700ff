"""Device and pinned host memory of one GPU through cuda-core, and arrays that stay on the device."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends import parse_device

STAGING = 64 << 20  # bytes of each of the two pinned buffers that weights pass through


def open_device(device: str) -> Any:
    """The cuda-core device of "auto", "cuda" or "cuda:N", made current. Raises BackendError where there is none.

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
        found.set_current()
    except Exception as error:  # the driver's errors have no common base
        raise BackendError(f"CUDA device {index or 0} cannot be used: {error}") from error
    return found


def architecture_of(device: Any) -> int:
    """89 for compute capability 8.9."""
    capability = device.compute_capability
    return int(10 * capability.major + capability.minor)


class Memory:
    """Buffers of one device, its compute stream, and copies in its order."""

    def __init__(self, device: Any) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        self._device, self._pinned = device, LegacyPinnedMemoryResource()
        self.stream = device.create_stream()

    def device_buffer(self, size: int) -> Any:
        """`size` bytes on the device."""
        return self._device.allocate(max(size, 1), stream=self.stream)

    def pinned_buffer(self, size: int) -> Any:
        """`size` bytes of pinned host memory."""
        return self._pinned.allocate(max(size, 1))

    def to_device(self, target: int, source: Any, size: int) -> None:
        """Copy from a pinned buffer to a device address, asynchronously."""
        driver = _driver()
        _check(driver.cuMemcpyHtoDAsync(target, int(source.handle), size, self.stream.handle))

    def to_host(self, target: Any, source: int, size: int, offset: int = 0) -> None:
        """Copy from a device address into a pinned buffer, asynchronously."""
        driver = _driver()
        _check(driver.cuMemcpyDtoHAsync(int(target.handle) + offset, source, size, self.stream.handle))

    def upload_file(self, path: Path, start: int, size: int) -> Any:
        """`size` bytes of a file from `start` on -> a device buffer, through two pinned buffers in turn."""
        target = self.device_buffer(size)
        staging = [self.pinned_buffer(min(STAGING, max(size, 1))) for _ in range(2)]
        done: list[Any] = [None, None]
        with open(path, "rb") as file:
            file.seek(start)
            for turn, offset in enumerate(range(0, size, STAGING)):
                slot, count = turn % 2, min(STAGING, size - offset)
                if done[slot] is not None:
                    done[slot].sync()
                if file.readinto(host_view(staging[slot], count).data) != count:
                    raise BackendError(f"{path} ended early: copy the bundle again")
                self.to_device(int(target.handle) + offset, staging[slot], count)
                done[slot] = self.stream.record()
        self.stream.sync()
        return target


def host_view(buffer: Any, size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of a pinned buffer as an array that shares its memory."""
    pointer = ctypes.cast(int(buffer.handle), ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, shape=(size,))


class DeviceArray:
    """A float32 array on the device; torch, CuPy and Numba take it through `__cuda_array_interface__`."""

    def __init__(self, buffer: Any, shape: tuple[int, ...], offset: int = 0) -> None:
        self._buffer, self.shape = buffer, shape
        self.pointer = int(buffer.handle) + offset
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (self.pointer, False),
            "version": 3,
            "strides": None,
        }


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise BackendError(f"CUDA reports {result[0]}")
