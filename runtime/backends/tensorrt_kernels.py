"""Names of the kernels that the tensorrt backend launches around its engines: what its bundles carry."""

from __future__ import annotations

from densegeo.kernels.resize_depth.arguments import row_name
from densegeo.outputs import Decode, Output

PREPROCESS = "preprocess.u8_fp32"
SPLIT = "split.fp32_fp32"
NORMALS = "normals.fp32"


def resize_depth_name(depth: Output, channels: int) -> str:
    """The kernel that resizes the depth picture of a decoder with so many channels."""
    return row_name("fp32", channels, depth.clamp)


def launched(decode: Decode, channels: int) -> list[str]:
    """All that a bundle's images need; channels: the decoder's."""
    split = [SPLIT] if decode.packing == "tokens" else []
    pictures = [NORMALS if row.kind == "normals" else resize_depth_name(row, channels) for row in decode.outputs]
    return [PREPROCESS, *split, *pictures]
