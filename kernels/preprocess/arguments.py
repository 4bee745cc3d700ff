"""What a launch of `preprocess` takes."""

from __future__ import annotations

from typing import NamedTuple

from densegeo.kernels.contract import Pointer


class Arguments(NamedTuple):
    """Of `preprocess_kernel`, in its order; shapes are there."""

    frame: Pointer
    rgb: Pointer
    source_width: int
    source_height: int
    row_stride: int  # bytes, as pixel_stride
    pixel_stride: int
    red: int  # byte of the red channel in a pixel: 0 for RGB, 2 for BGR
    left: int
    top: int
    box_width: int
    box_height: int
    width: int
    height: int
    taps_x: int
    taps_y: int


def tap_count(source: int, target: int) -> int:
    """Most source indices with a positive weight: an open interval of twice the larger pixel holds no more."""
    return -(-2 * max(source, target) // target)
