"""`preprocess` in one pass: a program makes a tile of the result from taps_x * taps_y source pixels each.

Two separable passes would read fewer taps when shrinking a lot, but need a float buffer of the source's height and a
second launch. 4K -> 1024x768 takes 8x6 taps; `benchmarks/gpu_check.py` times it, which was not done yet.
"""

from functools import cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from densegeo.colors import ColorRow
from densegeo.kernels.contract import Axis
from densegeo.kernels.launch import BOX, kind_of, launch, require_small
from densegeo.kernels.preprocess.arguments import Arguments, YcbcrArguments, arguments
from densegeo.kernels.sampling.kernel import MAX_PRODUCT, first_tap, tap_weight
from densegeo.kernels.table import Variant

if TYPE_CHECKING:
    import torch

BLOCK_X, BLOCK_Y = 128, 4
GRID = (Axis("width", BLOCK_X), Axis("height", BLOCK_Y))
SOURCE = ("source_width", "source_height", "row_stride", "pixel_stride", "taps_x", "taps_y", *BOX[:4])
PER_IMAGE = (*SOURCE, "red")  # width and height are the bucket's
PER_YCBCR_IMAGE = (*SOURCE, "luma", "chroma", "rows_shared")


@triton.jit
def store_pixels(rgb, r, g, b, total_x, total_y, x, y, width, height):
    """Sums of weighted channels in [0, 255] -> the tile of rgb, in [-1, 1]."""
    scale = (2.0 / 255.0) / (total_y[:, None] * total_x[None, :])
    target = rgb + y[:, None] * width + x[None, :]
    mask = (y < height)[:, None] & (x < width)[None, :]
    tl.store(target, (r * scale - 1).to(rgb.dtype.element_ty), mask=mask)
    tl.store(target + height * width, (g * scale - 1).to(rgb.dtype.element_ty), mask=mask)
    tl.store(target + 2 * height * width, (b * scale - 1).to(rgb.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=PER_IMAGE, do_not_specialize_on_alignment=("frame",))
def preprocess_kernel(
    frame,  # uint8 (source_height, source_width, 3), channels adjacent
    rgb,  # (1, 3, height, width), contiguous
    source_width,
    source_height,
    row_stride,  # bytes
    pixel_stride,  # bytes
    red,  # byte of the red channel in a pixel: 0 for RGB, 2 for BGR
    left,
    top,
    box_width,
    box_height,
    width,
    height,
    taps_x,  # see tap_count
    taps_y,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    inner_x = tl.minimum(tl.maximum(x - left, 0), box_width - 1)
    inner_y = tl.minimum(tl.maximum(y - top, 0), box_height - 1)
    first_x = first_tap(inner_x, source_width, box_width)
    first_y = first_tap(inner_y, source_height, box_height)

    r = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    g = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    b = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    total_x = tl.zeros((BLOCK_X,), tl.float32)
    total_y = tl.zeros((BLOCK_Y,), tl.float32)
    for i in range(taps_x):
        total_x += tap_weight(first_x + i, inner_x, source_width, box_width)
    for j in range(taps_y):
        tap_y = first_y + j
        weight_y = tap_weight(tap_y, inner_y, source_height, box_height)
        total_y += weight_y
        row = frame + tl.minimum(tap_y, source_height - 1)[:, None] * row_stride
        for i in range(taps_x):
            tap_x = first_x + i
            weight = weight_y[:, None] * tap_weight(tap_x, inner_x, source_width, box_width)[None, :]
            pixel = row + tl.minimum(tap_x, source_width - 1)[None, :] * pixel_stride
            r += weight * tl.load(pixel + red).to(tl.float32)
            g += weight * tl.load(pixel + 1).to(tl.float32)
            b += weight * tl.load(pixel + (2 - red)).to(tl.float32)

    store_pixels(rgb, r, g, b, total_x, total_y, x, y, width, height)


@triton.jit
def clamp_byte(value):
    """Clamp to [0, 255]."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0)


@triton.jit(do_not_specialize=PER_YCBCR_IMAGE, do_not_specialize_on_alignment=("frame",))
def preprocess_ycbcr_kernel(
    frame,  # uint8, see `colors.Ycbcr`
    rgb,  # (1, 3, height, width), contiguous
    source_width,
    source_height,
    row_stride,  # bytes
    pixel_stride,  # bytes
    luma,  # byte of the first one
    chroma,  # byte of the first Cb
    rows_shared,
    black,
    gain,
    red_v,
    green_u,
    green_v,
    blue_u,
    left,
    top,
    box_width,
    box_height,
    width,
    height,
    taps_x,  # see tap_count
    taps_y,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    inner_x = tl.minimum(tl.maximum(x - left, 0), box_width - 1)
    inner_y = tl.minimum(tl.maximum(y - top, 0), box_height - 1)
    first_x = first_tap(inner_x, source_width, box_width)
    first_y = first_tap(inner_y, source_height, box_height)

    r = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    g = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    b = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    total_x = tl.zeros((BLOCK_X,), tl.float32)
    total_y = tl.zeros((BLOCK_Y,), tl.float32)
    for i in range(taps_x):
        total_x += tap_weight(first_x + i, inner_x, source_width, box_width)
    for j in range(taps_y):
        tap_y = first_y + j
        weight_y = tap_weight(tap_y, inner_y, source_height, box_height)
        total_y += weight_y
        source_y = tl.minimum(tap_y, source_height - 1)
        luma_row = frame + luma + source_y[:, None] * row_stride
        chroma_row = frame + chroma + (source_y // rows_shared)[:, None] * row_stride
        for i in range(taps_x):
            tap_x = first_x + i
            weight = weight_y[:, None] * tap_weight(tap_x, inner_x, source_width, box_width)[None, :]
            source_x = tl.minimum(tap_x, source_width - 1)
            pair = chroma_row + (source_x // 2 * 2)[None, :] * pixel_stride
            value = (tl.load(luma_row + source_x[None, :] * pixel_stride).to(tl.float32) - black) * gain
            u = tl.load(pair).to(tl.float32) - 128.0
            v = tl.load(pair + pixel_stride).to(tl.float32) - 128.0
            r += weight * clamp_byte(value + red_v * v)
            g += weight * clamp_byte(value + green_u * u + green_v * v)
            b += weight * clamp_byte(value + blue_u * u)
    store_pixels(rgb, r, g, b, total_x, total_y, x, y, width, height)


@cache
def variant(target: str, ycbcr: bool = False) -> Variant:
    return Variant(
        name=f"preprocess.{'ycbcr' if ycbcr else 'u8'}_{target}",
        kernel=preprocess_ycbcr_kernel if ycbcr else preprocess_kernel,
        arguments=YcbcrArguments if ycbcr else Arguments,
        pointers={"frame": "u8", "rgb": target},
        constants={"BLOCK_X": BLOCK_X, "BLOCK_Y": BLOCK_Y},
        grid=GRID,
        aligned=("rgb",),  # a camera's frame may begin anywhere
        bundled=True,
    )


VARIANTS = (variant("fp32"), variant("fp32", ycbcr=True))


def preprocess(
    frame: "torch.Tensor", size: tuple[int, int], box: tuple[int, int, int, int], color: ColorRow, dtype: "torch.dtype"
) -> "torch.Tensor":
    """See `densegeo.kernels.preprocess.preprocess`."""
    import torch

    ycbcr = color.ycbcr
    source = (frame.shape[1], frame.shape[0]) if ycbcr is None else ycbcr.size(frame.shape)
    (left, top, box_width, box_height), (width, height) = box, size
    assert frame.dtype == torch.uint8
    assert ycbcr is not None or frame.shape[2] == 3
    assert frame.stride(-1) == 1
    assert 0 <= left < left + box_width <= width
    assert 0 <= top < top + box_height <= height
    assert max(source[0] * box_width, source[1] * box_height) <= MAX_PRODUCT
    rgb = torch.empty((1, 3, height, width), dtype=dtype, device=frame.device)
    require_small(frame, rgb)
    strides = frame.stride(0), frame.stride(1)
    launch(variant(kind_of(dtype), ycbcr is not None), arguments(color, frame, rgb, source, strides, box, size))
    return rgb
