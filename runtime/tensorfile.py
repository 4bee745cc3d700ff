"""Reads safetensors files with numpy alone: the runtime needs them only for a bundle's stored verification inputs.

The format: header length (8 bytes, little-endian), a JSON header of name -> dtype, shape, [begin, end), then raw data.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from densegeo.errors import BundleError

Array = npt.NDArray[Any]

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # widened to float32 after reading
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "|b1",
}
_MAX_HEADER = 100_000_000  # the format's own limit, in bytes


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_tensors(path: Path) -> dict[str, Array]:
    """All tensors of a safetensors file by name; bfloat16 becomes float32.

    Raises BundleError when the file is missing, truncated or malformed.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"Cannot read {path} ({error.strerror}).") from error
    entries, start = _header(path, raw)
    return {name: _tensor(path, name, entry, raw, start) for name, entry in entries.items()}


def tensor_offsets(path: Path) -> tuple[int, dict[str, int]]:
    """Where a safetensors file's data starts, and where each tensor begins in it, from the header alone.

    Raises BundleError when the file is missing or malformed.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(8)
            raw += file.read(min(_MAX_HEADER, int.from_bytes(raw, "little")))
    except OSError as error:
        raise BundleError(f"Cannot read {path} ({error.strerror}).") from error
    entries, start = _header(path, raw)
    return start, {name: entry.data_offsets[0] for name, entry in entries.items()}


def _header(path: Path, raw: bytes) -> tuple[dict[str, _Entry], int]:
    """The header's entries, and where the data starts."""
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(_MAX_HEADER, len(raw) - 8):
        raise BundleError(f"{path} is not a safetensors file, or is truncated: its header does not fit in it.")
    try:
        fields = msgspec.json.decode(raw[8 : 8 + size], type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        return {name: msgspec.json.decode(field, type=_Entry) for name, field in fields.items()}, 8 + size
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} has a malformed safetensors header ({error}).") from error


def _tensor(path: Path, name: str, entry: _Entry, raw: bytes, start: int) -> Array:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise BundleError(f"{path}: tensor {name} has dtype {entry.dtype}, which this reader does not know.")
    begin, end = entry.data_offsets
    expected = prod(entry.shape) * np.dtype(dtype).itemsize
    if min(entry.shape, default=0) < 0 or begin < 0 or end - begin != expected or start + end > len(raw):
        raise BundleError(f"{path}: tensor {name} does not fit its shape {entry.shape}, or the file is truncated.")
    values = np.frombuffer(raw[start + begin : start + end], dtype=dtype).reshape(entry.shape)
    if entry.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values
