"""The caller's image as it lies: on the device, where it is read in place, or on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends import dlpack, require_device
from densegeo.runtime.backends.cuda_memory import Memory, check


class Pixels(NamedTuple):
    """uint8 (h, w, 3) on the device, channels adjacent, or a layout of `colors.Ycbcr`; owner: keeps it there."""

    address: int
    strides: tuple[int, int]  # bytes between rows, and between pixels
    owner: object


def pixels_of(image: Any, memory: Memory) -> Pixels | NDArray[np.uint8]:
    """The image on the memory's device, behind the work of its producer's stream; or the array on the host.

    image: uint8 (h, w, 3) or YCbCr, with DLPack, `__cuda_array_interface__` or `__array__`. Raises BackendError.
    """
    if isinstance(image, np.ndarray):
        return np.ascontiguousarray(image)
    if hasattr(image, "__dlpack__") and hasattr(image, "__dlpack_device__"):
        kind, index = image.__dlpack_device__()
        if kind not in (dlpack.CUDA, dlpack.CUDA_MANAGED):
            return np.ascontiguousarray(np.from_dlpack(image))
        require_device(f"cuda:{index}", memory.device)
        return _from_dlpack(image, memory)
    if hasattr(image, "__cuda_array_interface__"):
        return _from_interface(image, memory)
    return np.ascontiguousarray(image)


def _from_dlpack(image: Any, memory: Memory) -> Pixels:
    """The producer makes the compute stream wait for its own (Python array API, `__dlpack__`)."""
    from cuda.core.utils import StridedMemoryView

    with memory.current():
        view = StridedMemoryView.from_dlpack(image, stream_ptr=int(memory.stream.handle))
    shape, strides = tuple(view.shape), view.strides
    return Pixels(view.ptr, _adjacent(shape, strides and tuple(strides)), (image, view))


def _from_interface(image: Any, memory: Memory) -> Pixels:
    """Version 3 names the producer's stream. Where it does not, nobody knows what is still to come: wait for all."""
    described = image.__cuda_array_interface__
    address, shape, stream = described["data"][0], tuple(described["shape"]), described.get("stream")
    with memory.current():
        from cuda.bindings import driver

        attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        require_device(f"cuda:{int(check(driver.cuPointerGetAttribute(attribute, address)))}", memory.device)
    if stream is None:
        memory.wait_for_device()
    else:
        memory.wait_for(stream)
    return Pixels(address, _adjacent(shape, described.get("strides")), image)


def _adjacent(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, int]:
    """Strides of rows and pixels. Raises BackendError unless the bytes of a pixel, or of a plane, are adjacent."""
    pixel_bytes = shape[2] if len(shape) == 3 else 1
    row, pixel, *channel = strides or (shape[1] * pixel_bytes, pixel_bytes, 1)[: len(shape)]
    if (channel or [pixel]) != [1] or min(row, pixel) < 0:
        raise BackendError("The bytes of a pixel of an image on the device must be adjacent: make it contiguous.")
    return row, pixel
