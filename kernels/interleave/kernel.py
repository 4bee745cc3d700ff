"""`interleave` in one pass: a program writes a run of pixels, whole rows of adjacent channels."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, Pointer
from densegeo.kernels.launch import kind_of, launch, require_small
from densegeo.kernels.table import Variant
from densegeo.precision import FLOATS

TILE = 4096  # values a program holds


@triton.jit
def interleave_kernel(
    phases,  # (batch, height / 2 + 1, width / 2 + 1, 4, channels)
    result,  # (batch, height, width, channels)
    height,
    width,
    pixels,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels, rounded up to a power of two
):
    picture = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    row = pixel // width
    column = pixel % width
    phase = 2 * (row % 2) + column % 2
    place = (picture * (height // 2 + 1) + (row + 1) // 2) * (width // 2 + 1) + (column + 1) // 2
    source = phases + (place * 4 + phase)[:, None] * channels + channel[None, :]
    value = tl.load(source, mask=mask, other=0.0)
    tl.store(result + (picture * pixels + pixel)[:, None] * channels + channel[None, :], value, mask=mask)


class Arguments(NamedTuple):
    """Of `interleave_kernel`."""

    phases: Pointer
    result: Pointer
    height: int
    width: int
    pixels: int
    channels: int


@cache
def variant(kind: str, channels: int) -> Variant:
    block = triton.next_power_of_2(channels)
    rows = max(1, TILE // block)
    return Variant(
        name=f"interleave.{channels}_{kind}",
        kernel=interleave_kernel,
        arguments=Arguments,
        pointers={"phases": kind, "result": kind},
        constants={"BLOCK_P": rows, "BLOCK_C": block},
        grid=(Axis("pixels", rows), Axis("batch")),
        aligned=("phases", "result"),
    )


VARIANTS = tuple(variant(kind, channels) for kind in FLOATS for channels in (256, 512))  # of the autoencoder


def interleave(phases: torch.Tensor) -> torch.Tensor:
    """See `densegeo.kernels.interleave.interleave`."""
    batch, channels, height, width = phases.shape
    assert phases.is_contiguous(memory_format=torch.channels_last)
    assert channels % 4 == 0
    shape = batch, channels // 4, 2 * (height - 1), 2 * (width - 1)
    result = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)
    require_small(phases, result)
    sizes = shape[2], shape[3], shape[2] * shape[3], shape[1]
    launch(variant(kind_of(phases.dtype), shape[1]), Arguments(phases, result, *sizes), batch)
    return result
