"""`split` in one pass: a program moves a run of one token row, read along features and written along columns."""

from functools import cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from densegeo.kernels.contract import Axis
from densegeo.kernels.launch import kind_of, launch, require_small
from densegeo.kernels.split.arguments import Arguments
from densegeo.kernels.table import Variant

if TYPE_CHECKING:
    import torch

BLOCK_T = 32  # tokens a program
GRID = (Axis("columns", BLOCK_T), Axis("rows"), Axis("batch", times=2))


@triton.jit
def split_kernel(
    velocity,  # (batch, 2 * rows * columns, features)
    latents,  # (2 * batch, features / 4, 2 * rows, 2 * columns), contiguous
    batch,
    rows,
    columns,
    features,
    batch_stride,
    token_stride,
    scale,
    shift,
    first_factor,
    second_factor,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,  # features, rounded up to a power of two
):
    row = tl.program_id(1)
    picture = tl.program_id(2)
    half = picture // batch
    sign = tl.where(half == 0, first_factor, second_factor)

    column = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = tl.arange(0, BLOCK_F)
    token = (half * rows + row) * columns + column
    source = velocity + (picture % batch) * batch_stride + token[:, None] * token_stride + feature[None, :]
    value = tl.load(source, mask=(column < columns)[:, None] & (feature < features)[None, :], other=0.0)
    value = value.to(tl.float32) * sign / scale + shift

    # (token, (channel, down), right) -> ((channel, down), (token, right))
    value = tl.permute(tl.reshape(value, (BLOCK_T, BLOCK_F // 2, 2)), (1, 0, 2))
    value = tl.reshape(value, (BLOCK_F // 2, 2 * BLOCK_T))
    line = tl.arange(0, BLOCK_F // 2)
    x = tl.program_id(0) * 2 * BLOCK_T + tl.arange(0, 2 * BLOCK_T)
    y = (picture * (features // 4) + line // 2) * 2 * rows + 2 * row + line % 2
    mask = (line < features // 2)[:, None] & (x < 2 * columns)[None, :]
    target = latents + y[:, None] * 2 * columns + x[None, :]
    tl.store(target, value.to(latents.dtype.element_ty), mask=mask)


@cache
def variant(source: str, target: str, features: int) -> Variant:
    """features: of a token, rounded up to a power of two."""
    return Variant(
        name=f"split.{source}_{target}",
        kernel=split_kernel,
        arguments=Arguments,
        pointers={"velocity": source, "latents": target},
        constants={"BLOCK_T": BLOCK_T, "BLOCK_F": features},
        grid=GRID,
        aligned=("velocity", "latents"),
        bundled=True,
    )


VARIANTS = (variant("fp32", "fp32", 64),)


def split(
    velocity: "torch.Tensor",
    height: int,
    width: int,
    scale: float,
    shift: float,
    first_factor: float,
    second_factor: float,
    dtype: "torch.dtype",
) -> "torch.Tensor":
    """See `densegeo.kernels.split.split`; a token's features must be adjacent."""
    import torch

    batch, tokens, features = velocity.shape
    rows, columns = height // 16, width // 16
    assert height % 16 == width % 16 == features % 4 == 0
    assert tokens == 2 * rows * columns
    assert velocity.stride(2) == 1
    latents = torch.empty((2 * batch, features // 4, 2 * rows, 2 * columns), dtype=dtype, device=velocity.device)
    require_small(velocity, latents)
    row = variant(kind_of(velocity.dtype), kind_of(dtype), triton.next_power_of_2(features))
    strides = velocity.stride(0), velocity.stride(1)
    line = scale, shift, first_factor, second_factor
    launch(row, Arguments(velocity, latents, batch, rows, columns, features, *strides, *line))
    return latents
