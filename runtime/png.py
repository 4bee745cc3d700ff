"""PNG files (W3C Recommendation, third edition) written with one filter for all rows.

Pillow tries five filters a row, which takes longer than the compression. Every pixel less its left neighbour is what
these maps, enlarged smoothly, shrink best by. Measured on maps of 1920x1080, processor time and file, Pillow at the
same level -> here: depth in colour 77 ms, 532 kB -> 29 ms, 525 kB; normals 136 ms, 1966 kB -> 103 ms, 2009 kB.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2  # colour types
_SUB = 1  # the filter: less the pixel at the left
# of zlib, by bytes a value: runs for 8 bits, where searching for repetitions finds little
_STRATEGY = {1: zlib.Z_RLE, 2: zlib.Z_DEFAULT_STRATEGY}


def write_png(stream: BinaryIO, picture: NDArray[Any], text: Mapping[str, str]) -> None:
    """picture: (H, W) uint8 or uint16 grey, or (H, W, 3) uint8 RGB. text: goes before the pixels."""
    height, width = picture.shape[:2]
    size = picture.dtype.itemsize
    kind = _RGB if picture.ndim == 3 else _GREY
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    stream.write(_SIGNATURE)
    _chunk(stream, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * size, kind, 0, 0, 0))
    for name, data, *_ in info.chunks:
        _chunk(stream, name, data)
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, _STRATEGY[size])
    _chunk(stream, b"IDAT", packer.compress(_filtered(picture).data) + packer.flush())
    _chunk(stream, b"IEND", b"")


def _filtered(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, 1 + bytes of a row): of each row the filter's number, then its bytes less those one pixel to the left."""
    height, width = picture.shape[:2]
    rows = np.ascontiguousarray(picture, dtype=picture.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    pixel = rows.shape[1] // width
    filtered = np.empty((height, 1 + rows.shape[1]), dtype=np.uint8)
    filtered[:, 0] = _SUB
    filtered[:, 1 : 1 + pixel] = rows[:, :pixel]
    np.subtract(rows[:, pixel:], rows[:, :-pixel], out=filtered[:, 1 + pixel :])
    return filtered


def _chunk(stream: BinaryIO, name: bytes, data: bytes) -> None:
    stream.write(struct.pack(">I", len(data)) + name)
    stream.write(data)
    stream.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))
