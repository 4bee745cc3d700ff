"""`log_dequantize` in one pass: a program makes a tile of one output picture."""

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, programs
from densegeo.kernels.launch import BOX, OPTIONS, require_small
from densegeo.kernels.sampling.kernel import MAX_PRODUCT, clamp_unit, taps

BLOCK_X, BLOCK_Y = 128, 4
GRID = (Axis("width", BLOCK_X), Axis("height", BLOCK_Y), Axis("batch"))


@triton.jit
def _prediction(pixel, channel_stride, CHANNELS: tl.constexpr, CLAMP_FIRST: tl.constexpr):
    total = tl.load(pixel).to(tl.float32)
    if CLAMP_FIRST:
        total = clamp_unit(total)
    for channel in tl.static_range(1, CHANNELS):
        value = tl.load(pixel + channel * channel_stride).to(tl.float32)
        if CLAMP_FIRST:
            value = clamp_unit(value)
        total += value
    mean = total / CHANNELS
    if not CLAMP_FIRST:
        mean = clamp_unit(mean)
    return mean * 0.5 + 0.5


@triton.jit(do_not_specialize=BOX)
def log_dequantize_kernel(
    decoded,  # (batch, CHANNELS, H, W)
    depth,  # (batch, height, width) float32, contiguous, as the next two
    valid,  # uint8, 0 or 1
    prediction,  # float32; not written without WITH_PREDICTION
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
    scale,
    shift,
    low,
    high,
    CHANNELS: tl.constexpr,
    CLAMP_FIRST: tl.constexpr,
    WITH_PREDICTION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    picture = tl.program_id(2)
    x0, x1, right = taps(x, box_width, width)
    y0, y1, down = taps(y, box_height, height)
    right = right[None, :]
    down = down[:, None]

    origin = decoded + picture * batch_stride
    column0 = (left + x0)[None, :] * column_stride
    column1 = (left + x1)[None, :] * column_stride
    row0 = (top + y0)[:, None] * row_stride
    row1 = (top + y1)[:, None] * row_stride
    above = _prediction(origin + row0 + column0, channel_stride, CHANNELS, CLAMP_FIRST) * (1 - right)
    above += _prediction(origin + row0 + column1, channel_stride, CHANNELS, CLAMP_FIRST) * right
    below = _prediction(origin + row1 + column0, channel_stride, CHANNELS, CLAMP_FIRST) * (1 - right)
    below += _prediction(origin + row1 + column1, channel_stride, CHANNELS, CLAMP_FIRST) * right
    p = above * (1 - down) + below * down

    metres = tl.exp(scale * p + shift)
    metres = tl.where(metres < low, low, tl.where(metres > high, high, metres))
    good = (metres > 0) & (metres < float("inf"))  # NaN is neither
    offset = (picture * height + y[:, None]) * width + x[None, :]
    mask = (y < height)[:, None] & (x < width)[None, :]
    tl.store(depth + offset, tl.where(good, metres, float("nan")), mask=mask)
    tl.store(valid + offset, good.to(tl.uint8), mask=mask)
    if WITH_PREDICTION:
        tl.store(prediction + offset, p, mask=mask)


def log_dequantize(
    decoded: torch.Tensor,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    scale: float,
    shift: float,
    clamp_first: bool,
    depth_range: tuple[float, float],
    with_prediction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `densegeo.kernels.log_dequantize.log_dequantize`."""
    batch, channels, rows, columns = decoded.shape
    (left, top, box_width, box_height), (width, height) = box, size
    assert 0 <= left < left + box_width <= columns
    assert 0 <= top < top + box_height <= rows
    assert max(box_width * width, box_height * height) <= MAX_PRODUCT
    depth = torch.empty((batch, height, width), dtype=torch.float32, device=decoded.device)
    valid = torch.empty((batch, height, width), dtype=torch.uint8, device=decoded.device)
    prediction = torch.empty_like(depth) if with_prediction else None
    require_small(decoded, depth)
    log_dequantize_kernel[programs(GRID, width=width, height=height, batch=batch)](
        decoded,
        depth,
        valid,
        depth if prediction is None else prediction,
        *decoded.stride(),
        left,
        top,
        box_width,
        box_height,
        width,
        height,
        scale,
        shift,
        *depth_range,
        CHANNELS=channels,
        CLAMP_FIRST=clamp_first,
        WITH_PREDICTION=with_prediction,
        BLOCK_X=BLOCK_X,
        BLOCK_Y=BLOCK_Y,
        **OPTIONS,
    )
    return depth, valid.view(torch.bool), prediction
