"""What a launch of `preprocess` takes."""

from __future__ import annotations

from typing import NamedTuple

from densegeo.colors import ColorRow
from densegeo.kernels.contract import Pointer

Box = tuple[int, int, int, int]  # left, top, width, height


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


class YcbcrArguments(NamedTuple):
    """Of `preprocess_ycbcr_kernel`, in its order; the conversion's numbers are those of `colors.Conversion`."""

    frame: Pointer
    rgb: Pointer
    source_width: int
    source_height: int
    row_stride: int  # bytes, as pixel_stride, of luma; a row of chroma is as long
    pixel_stride: int
    luma: int  # byte of the first one
    chroma: int  # byte of the first Cb
    rows_shared: int  # rows of pixels for which there is one of chroma
    black: float
    gain: float
    red_v: float
    green_u: float
    green_v: float
    blue_u: float
    left: int
    top: int
    box_width: int
    box_height: int
    width: int
    height: int
    taps_x: int
    taps_y: int


def arguments(
    color: ColorRow,
    frame: Pointer,
    rgb: Pointer,
    source: tuple[int, int],
    strides: tuple[int, int],
    box: Box,
    size: tuple[int, int],
) -> Arguments | YcbcrArguments:
    """Of the kernel for this color. source, size: (width, height); strides: of rows and pixels, in bytes."""
    counts = tap_count(source[0], box[2]), tap_count(source[1], box[3])
    ycbcr = color.ycbcr
    if ycbcr is None:
        return Arguments(frame, rgb, *source, *strides, color.red, *box, *size, *counts)
    places = ycbcr.luma, ycbcr.chroma(source[1], strides[0]), ycbcr.rows_shared
    by = ycbcr.conversion
    line = by.black, by.gain, by.red_v, by.green_u, by.green_v, by.blue_u
    return YcbcrArguments(frame, rgb, *source, *strides, *places, *line, *box, *size, *counts)


def tap_count(source: int, target: int) -> int:
    """Most source indices with a positive weight: an open interval of twice the larger pixel holds no more."""
    return -(-2 * max(source, target) // target)
