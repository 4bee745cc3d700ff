"""The stand-in driver as seen from Python: its schedule, its problems, its kernels and host functions."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATISTICS = ("synchronisations", "allocations", "reuses", "pinned allocations", "copies", "launches", "graph launches")
LIVING = ("device blocks", "pinned blocks", "streams", "graphs", "device bytes")
_KERNEL = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int
)
_HOST = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# image, (grid, block, shared bytes), address of the arguments, [(offset, size)]
OnKernel = Callable[[int, tuple[int, ...], int, list[tuple[int, int]]], None]


class Driver:
    """libcuda.so.1 of this process, which must be the stand-in. Callbacks' errors are collected as failures."""

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL("libcuda.so.1")
        self._library.standin_problems.restype = ctypes.c_char_p  # a real driver has no such function: AttributeError
        self._library.standin_statistic.restype = ctypes.c_long
        self._library.standin_living.restype = ctypes.c_long
        self._library.standin_check.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._library.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._kept: list[object] = []  # callbacks that queues may still hold
        self.failures: list[str] = []

    def schedule(self, how: str) -> None:
        """lazy, eager or random:SEED. Forgets earlier problems and failures."""
        self._library.standin_schedule(how.encode())
        self._library.standin_clear_problems()
        self.failures.clear()

    @property
    def problems(self) -> list[str]:
        lines: list[str] = self._library.standin_problems().decode().splitlines()
        return lines

    @property
    def captures(self) -> int:
        """How many streams are being recorded."""
        return int(self._library.standin_captures())

    def statistics(self) -> dict[str, int]:
        return {name: self._library.standin_statistic(index) for index, name in enumerate(STATISTICS)}

    def living(self) -> dict[str, int]:
        """What was made and not released."""
        return {name: self._library.standin_living(index) for index, name in enumerate(LIVING)}

    def on_kernel(self, run: OnKernel) -> None:
        """What is called when a stream comes to a launch."""

        def callback(image: int, launch: Any, arguments: int, layout: Any, count: int) -> None:
            pairs = [(layout[2 * i], layout[2 * i + 1]) for i in range(count)]
            self._guarded(lambda: run(image, tuple(launch[:7]), arguments, pairs))

        function = _KERNEL(callback)
        self._kept.append(function)
        self._library.standin_on_kernel(function)

    def enqueue(self, stream: int, call: Callable[[], None]) -> bool:
        """Call a function when a stream comes to it; False when the stream takes none."""
        function = _HOST(lambda _: self._guarded(call))
        self._kept.append(function)
        return bool(self._library.cuLaunchHostFunc(stream, ctypes.cast(function, ctypes.c_void_p), None) == 0)

    def device(self) -> int:
        """The current context's."""
        actual = ctypes.c_int()
        assert self._library.cuCtxGetDevice(ctypes.byref(actual)) == 0, "no context is current"
        return actual.value

    def view(self, address: int, shape: Any, dtype: Any = np.float32, *, what: str, device: int = -1) -> NDArray[Any]:
        """What lies at an address; a problem is noted unless it all lies in one live block (of the device)."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._library.standin_check(what.encode(), address, size, device)
        raw = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), shape=(size,))
        return raw.view(dtype).reshape(shape)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # it cannot leave a callback
            traceback.print_exc()
            self.failures.append(f"{type(error).__name__}: {error}")
