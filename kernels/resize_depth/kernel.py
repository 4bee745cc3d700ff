"""`resize_depth` in one pass: a program makes a tile of one output picture."""

from functools import cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from densegeo.kernels.contract import Axis
from densegeo.kernels.launch import BOX, kind_of, launch, require_small
from densegeo.kernels.resize_depth.arguments import Arguments, Metres, row_name
from densegeo.kernels.sampling.kernel import MAX_PRODUCT, clamp_unit, corners, mix
from densegeo.kernels.table import Variant
from densegeo.outputs import SPACES, Clamp, Space

if TYPE_CHECKING:
    import torch

BLOCK_X, BLOCK_Y = 128, 4
GRID = (Axis("width", BLOCK_X), Axis("height", BLOCK_Y), Axis("batch"))


@triton.jit
def _prediction(pixel, channel_stride, CHANNELS: tl.constexpr, BEFORE_MEAN: tl.constexpr):
    total = tl.load(pixel).to(tl.float32)
    if BEFORE_MEAN:
        total = clamp_unit(total)
    for channel in tl.static_range(1, CHANNELS):
        value = tl.load(pixel + channel * channel_stride).to(tl.float32)
        if BEFORE_MEAN:
            value = clamp_unit(value)
        total += value
    mean = total / CHANNELS
    if not BEFORE_MEAN:
        mean = clamp_unit(mean)
    return mean * 0.5 + 0.5


@triton.jit(do_not_specialize=BOX)
def resize_depth_kernel(
    decoded,  # (batch, CHANNELS, H, W)
    resized,  # (batch, height, width) float32, contiguous
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    left,
    top,
    box_width,
    box_height,
    width,
    height,
    scale,  # this and the next three are not read for SPACE 0
    shift,
    near,  # metres, as far
    far,
    CHANNELS: tl.constexpr,
    BEFORE_MEAN: tl.constexpr,
    SPACE: tl.constexpr,  # 0: the prediction itself; 1, 2, 3: metres of log_affine, affine, disparity_affine
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    picture = tl.program_id(2)
    ends = corners(x, y, left, top, box_width, box_height, width, height, row_stride, column_stride)
    above0, above1, below0, below1, right, down = ends

    origin = decoded + picture * batch_stride
    p = mix(
        _prediction(origin + above0, channel_stride, CHANNELS, BEFORE_MEAN),
        _prediction(origin + above1, channel_stride, CHANNELS, BEFORE_MEAN),
        _prediction(origin + below0, channel_stride, CHANNELS, BEFORE_MEAN),
        _prediction(origin + below1, channel_stride, CHANNELS, BEFORE_MEAN),
        right,
        down,
    )
    if SPACE > 0:
        p = scale * p + shift
        if SPACE == 1:
            p = tl.exp(p)
        if SPACE == 3:
            p = 1.0 / p
        positive = (p > 0) & (p < float("inf"))  # NaN is neither
        p = tl.where(positive, tl.where(p < near, near, tl.where(p > far, far, p)), float("nan"))
    offset = (picture * height + y[:, None]) * width + x[None, :]
    tl.store(resized + offset, p, mask=(y < height)[:, None] & (x < width)[None, :])


@cache
def variant(kind: str, channels: int, clamp: Clamp, space: Space | None = None) -> Variant:
    return Variant(
        name=row_name(kind, channels, clamp, space),
        kernel=resize_depth_kernel,
        arguments=Arguments,
        pointers={"decoded": kind, "resized": "fp32"},
        constants={
            "CHANNELS": channels,
            "BEFORE_MEAN": clamp == "before_mean",
            "SPACE": 0 if space is None else 1 + SPACES.index(space),
            "BLOCK_X": BLOCK_X,
            "BLOCK_Y": BLOCK_Y,
        },
        grid=GRID,
        aligned=("decoded", "resized"),
        bundled=kind == "fp32",
    )


PICTURES: tuple[tuple[int, Clamp], ...] = (
    (3, "before_mean"),
    (3, "after_mean"),
    (1, "after_mean"),  # the mean folded into the decoder's last convolution
)
VARIANTS = tuple(variant("fp32", *picture, space) for picture in PICTURES for space in (None, *SPACES))


def resize_depth(
    decoded: "torch.Tensor",
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    clamp: Clamp,
    metres: Metres | None = None,
) -> "torch.Tensor":
    """See `densegeo.kernels.resize_depth.resize_depth`."""
    import torch

    batch, channels, rows, columns = decoded.shape
    (left, top, box_width, box_height), (width, height) = box, size
    assert 0 <= left < left + box_width <= columns
    assert 0 <= top < top + box_height <= rows
    assert max(box_width * width, box_height * height) <= MAX_PRODUCT
    resized = torch.empty((batch, height, width), dtype=torch.float32, device=decoded.device)
    require_small(decoded, resized)
    calibration = metres or Metres("affine", 1.0, 0.0)
    line = calibration.scale, calibration.shift, calibration.near, calibration.far
    strides = decoded.stride(0), decoded.stride(1), decoded.stride(2), decoded.stride(3)
    row = variant(kind_of(decoded.dtype), channels, clamp, metres and metres.space)
    launch(row, Arguments(decoded, resized, *strides, *box, *size, *line), batch)
    return resized
