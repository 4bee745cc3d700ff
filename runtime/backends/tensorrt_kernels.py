"""Names of the kernels that the tensorrt backend launches around its engines: what its bundles carry."""

from __future__ import annotations

from densegeo.kernels.resize_depth.arguments import row_name
from densegeo.outputs import Decode, Output

PREPROCESS, PREPROCESS_YCBCR = "preprocess.u8_fp32", "preprocess.ycbcr_fp32"
SPLIT = "split.fp32_fp32"
NORMALS = "normals.fp32"


def resize_depth_name(depth: Output, channels: int, metres: bool) -> str:
    """The kernel that resizes the depth picture of a decoder with so many channels, as it is or into metres."""
    return row_name("fp32", channels, depth.clamp, depth.space if metres else None)


def launched(decode: Decode, channels: int) -> list[str]:
    """All that a bundle's images need; channels: the decoder's."""
    split = [SPLIT] if decode.packing == "tokens" else []
    depths = [row for row in decode.outputs if row.kind == "depth"]
    resized = [resize_depth_name(row, channels, metres) for row in depths for metres in (False, True)]
    return [PREPROCESS, PREPROCESS_YCBCR, *split, *resized, *([NORMALS] if decode.has("normals") else [])]
