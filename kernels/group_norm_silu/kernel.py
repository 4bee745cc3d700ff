"""`group_norm_silu` in three launches: statistics of runs of pixels, their merger, and the application.

Pixels are rows of C adjacent channels, so all reads and writes are whole rows.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, Pointer
from densegeo.kernels.launch import kind_of, launch, require_small
from densegeo.kernels.table import Variant
from densegeo.precision import FLOATS

TILE = 8192  # values a program holds (measured on an H100, benchmarks/LOG.md)
RUNS = 256  # runs of pixels a picture is cut into for its statistics: about two for each processor of an H100


@triton.jit
def statistics_kernel(
    x,  # (batch, pixels, channels)
    partial,  # (batch, runs, 2, channels) float32: mean, sum of squared deviations
    pixels,
    channels,
    runs,
    run,  # pixels a run
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels, rounded up to a power of two
):
    index = tl.program_id(0)
    picture = tl.program_id(1)
    channel = tl.arange(0, BLOCK_C)
    first = index * run
    last = tl.minimum(first + run, pixels)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        mask = (pixel < last)[:, None] & (channel < channels)[None, :]
        source = x + (picture * pixels + pixel[:, None]) * channels + channel[None, :]
        value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        added = tl.minimum(last - start, BLOCK_P).to(tl.float32)
        block_mean = tl.sum(value, axis=0) / added
        centred = tl.where(mask, value - block_mean[None, :], 0.0)
        total = count + added
        gap = block_mean - mean
        squares += tl.sum(centred * centred, axis=0) + gap * gap * (count * added / total)
        mean += gap * (added / total)
        count = total
    target = partial + ((picture * runs + index) * 2) * channels + channel
    tl.store(target, mean, mask=channel < channels)
    tl.store(target + channels, squares, mask=channel < channels)


@triton.jit
def merge_kernel(
    partial,  # (batch, runs, 2, channels) float32
    weight,  # (channels,) float32, as bias
    bias,
    affine,  # (batch, 2, channels) float32: gain, offset
    pixels,
    channels,
    runs,
    run,
    eps,
    WIDTH: tl.constexpr,  # channels a group
    BLOCK_R: tl.constexpr,  # runs, rounded up to a power of two
    BLOCK_G: tl.constexpr,  # WIDTH, rounded up to a power of two
):
    picture = tl.program_id(1)
    lane = tl.arange(0, BLOCK_G)
    channel = tl.program_id(0) * WIDTH + lane
    index = tl.arange(0, BLOCK_R)
    mask = (index < runs)[:, None] & (lane < WIDTH)[None, :]
    source = partial + ((picture * runs + index[:, None]) * 2) * channels + channel[None, :]
    means = tl.load(source, mask=mask, other=0.0)
    squares = tl.load(source + channels, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(pixels - index * run, run), 0).to(tl.float32)[:, None]
    total = pixels.to(tl.float32) * WIDTH
    mean = tl.sum(tl.sum(means * count, axis=1), axis=0) / total
    gap = tl.where(mask, means - mean, 0.0)
    deviation = tl.sqrt(tl.sum(tl.sum(squares + count * gap * gap, axis=1), axis=0) / total + eps)
    gain = tl.load(weight + channel, mask=lane < WIDTH, other=0.0) / deviation
    offset = tl.load(bias + channel, mask=lane < WIDTH, other=0.0) - mean * gain
    target = affine + picture * 2 * channels + channel
    tl.store(target, gain, mask=lane < WIDTH)
    tl.store(target + channels, offset, mask=lane < WIDTH)


@triton.jit
def apply_kernel(
    x,  # (batch, pixels, channels), as result
    affine,  # (batch, 2, channels) float32
    result,
    pixels,
    channels,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    picture = tl.program_id(1)
    channel = tl.arange(0, BLOCK_C)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    offset = (picture * pixels + pixel[:, None]) * channels + channel[None, :]
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    line = affine + picture * 2 * channels + channel
    gain = tl.load(line, mask=channel < channels, other=0.0)
    shift = tl.load(line + channels, mask=channel < channels, other=0.0)
    normed = value * gain[None, :] + shift[None, :]
    if SILU:
        normed = normed / (1 + tl.exp(-normed))
    tl.store(result + offset, normed.to(result.dtype.element_ty), mask=mask)


class StatisticsArguments(NamedTuple):
    """Of `statistics_kernel`."""

    x: Pointer
    partial: Pointer
    pixels: int
    channels: int
    runs: int
    run: int


class MergeArguments(NamedTuple):
    """Of `merge_kernel`."""

    partial: Pointer
    weight: Pointer
    bias: Pointer
    affine: Pointer
    pixels: int
    channels: int
    runs: int
    run: int
    eps: float


class ApplyArguments(NamedTuple):
    """Of `apply_kernel`."""

    x: Pointer
    affine: Pointer
    result: Pointer
    pixels: int
    channels: int


def blocks(channels: int) -> dict[str, int | bool]:
    """Pixels and channels that a program holds."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK_P": max(1, TILE // block), "BLOCK_C": block}


@cache
def statistics(kind: str, channels: int) -> Variant:
    return Variant(
        name=f"group_norm_silu.statistics{channels}_{kind}",
        kernel=statistics_kernel,
        arguments=StatisticsArguments,
        pointers={"x": kind, "partial": "fp32"},
        constants=blocks(channels),
        grid=(Axis("runs"), Axis("batch")),
        aligned=("x", "partial"),
    )


@cache
def merge(channels: int, groups: int, runs: int) -> Variant:
    """A program makes a group. It does not see the picture's type. runs: rounded up to a power of two."""
    width = channels // groups
    return Variant(
        name=f"group_norm_silu.merge{channels}",
        kernel=merge_kernel,
        arguments=MergeArguments,
        pointers=dict.fromkeys(("partial", "weight", "bias", "affine"), "fp32"),
        constants={"WIDTH": width, "BLOCK_R": runs, "BLOCK_G": triton.next_power_of_2(width)},
        grid=(Axis("channels", width), Axis("batch")),
        aligned=("partial", "weight", "bias", "affine"),
    )


@cache
def application(kind: str, target: str, channels: int, silu: bool) -> Variant:
    """target: of the result."""
    sizes = blocks(channels)
    return Variant(
        name=f"group_norm_silu.apply{channels}_{kind}" + (f"_{target}" if target != kind else ""),
        kernel=apply_kernel,
        arguments=ApplyArguments,
        pointers={"x": kind, "affine": "fp32", "result": target},
        constants={"SILU": silu, **sizes},
        grid=(Axis("pixels", sizes["BLOCK_P"]), Axis("batch")),
        aligned=("x", "affine", "result"),
    )


CHANNELS = (128, 512)  # the autoencoder's narrowest and widest, in 32 groups
VARIANTS = (
    *(statistics(kind, channels) for kind in FLOATS for channels in CHANNELS),
    *(merge(channels, 32, RUNS) for channels in CHANNELS),
    *(application(kind, kind, channels, silu=True) for kind in FLOATS for channels in CHANNELS),
    *(application(kind, "fp32", CHANNELS[0], silu=True) for kind in ("bf16", "fp16")),  # the decoder's last norm
)


def runs_of(pixels: int, channels: int) -> tuple[int, int]:
    """Of a picture: into how many runs its statistics are cut, and pixels a run."""
    rows = blocks(channels)["BLOCK_P"]
    run = rows * triton.cdiv(pixels, RUNS * rows)
    return triton.cdiv(pixels, run), run


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `densegeo.kernels.group_norm_silu.group_norm_silu`."""
    batch, channels, height, width = x.shape
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert channels % groups == 0
    assert weight.shape == bias.shape == (channels,)
    assert weight.dtype == bias.dtype == torch.float32
    assert weight.is_contiguous()
    assert bias.is_contiguous()
    pixels, kind = height * width, kind_of(x.dtype)
    runs, run = runs_of(pixels, channels)
    partial = torch.empty((batch, runs, 2, channels), dtype=torch.float32, device=x.device)
    affine = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
    result = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    require_small(x, result, partial)
    sizes = pixels, channels, runs, run
    launch(statistics(kind, channels), StatisticsArguments(x, partial, *sizes), batch)
    row = merge(channels, groups, triton.next_power_of_2(runs))
    launch(row, MergeArguments(partial, weight, bias, affine, *sizes, eps), batch)
    launch(
        application(kind, kind_of(result.dtype), channels, silu),
        ApplyArguments(x, affine, result, pixels, channels),
        batch,
    )
    return result
