"""DLPack capsules of device memory, made without any array library (dmlc.github.io/dlpack, Python array API)."""

from __future__ import annotations

import ctypes
from typing import Any

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
CODES = {"u": 1, "f": 2}  # DLDataTypeCode of numpy's kinds
NAME = b"dltensor"  # of a capsule that nobody has taken yet; whoever takes it renames it


class _Tensor(ctypes.Structure):
    """DLTensor: what lies where, C order."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; null: C order
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_python = ctypes.pythonapi
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _Callback]
_python.PyCapsule_IsValid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]

_exported: dict[int, tuple[Any, ...]] = {}  # address of a _Managed -> what it points to, until its deleter is called


def _release(managed: int) -> None:
    """DLManagedTensor's deleter: the taker is done."""
    _exported.pop(managed, None)


def _end(capsule: int) -> None:
    """The capsule's own end: its memory is the taker's business once it was taken. An address: it is no object now."""
    if _python.PyCapsule_IsValid(capsule, NAME):
        _release(_python.PyCapsule_GetPointer(capsule, NAME))


_RELEASE, _END = _Callback(_release), _Callback(_end)  # called for as long as the process lives


def capsule(address: int, shape: tuple[int, ...], kind: str, bits: int, device: int, owner: object) -> Any:
    """A capsule of C-ordered CUDA memory; `owner` lives until the taker is done with it. kind: "f" or "u"."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    managed.tensor = _Tensor(address, CUDA, device, len(shape), CODES[kind], bits, 1, sizes, None, 0)
    managed.deleter = ctypes.cast(_RELEASE, ctypes.c_void_p).value
    address_of_managed = ctypes.addressof(managed)
    _exported[address_of_managed] = managed, sizes, owner
    return _python.PyCapsule_New(address_of_managed, NAME, _END)
