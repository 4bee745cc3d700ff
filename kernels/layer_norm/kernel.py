"""`layer_norm` in one pass: a program holds one token."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, Pointer
from densegeo.kernels.launch import kind_of, launch, require_small
from densegeo.kernels.quantize.kernel import QMAX_OF_KIND, rounded
from densegeo.kernels.quantize.reference import QMAX_OF
from densegeo.kernels.table import Variant
from densegeo.precision import FLOATS

GRID = (Axis("tokens"), Axis("batch"))


@triton.jit
def layer_norm_kernel(
    x,  # (batch, tokens, hidden)
    weight,  # (hidden,) float32, as bias
    bias,
    normed,  # (batch, tokens, hidden), contiguous
    tokens,
    hidden,
    batch_stride,
    token_stride,
    eps,
    inverse_scale,  # not read without QMAX
    QMAX: tl.constexpr,  # largest magnitude of an 8-bit result, 0 for others
    BLOCK_H: tl.constexpr,  # hidden, rounded up to a power of two
):
    token = tl.program_id(0)
    picture = tl.program_id(1)
    feature = tl.arange(0, BLOCK_H)
    mask = feature < hidden
    value = tl.load(x + picture * batch_stride + token * token_stride + feature, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, value - tl.sum(value, axis=0) / hidden, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / hidden + eps)
    gain = tl.load(weight + feature, mask=mask, other=0.0)
    offset = tl.load(bias + feature, mask=mask, other=0.0)
    result = rounded(centred / deviation * gain + offset, inverse_scale, QMAX)
    target = normed + (picture * tokens + token) * hidden + feature
    tl.store(target, result.to(normed.dtype.element_ty), mask=mask)


class Arguments(NamedTuple):
    """Of `layer_norm_kernel`."""

    x: Pointer
    weight: Pointer
    bias: Pointer
    normed: Pointer
    tokens: int
    hidden: int
    batch_stride: int
    token_stride: int
    eps: float
    inverse_scale: float


@cache
def variant(kind: str, target: str, hidden: int) -> Variant:
    """target: of the norm. hidden: rounded up to a power of two."""
    return Variant(
        name=f"layer_norm.{kind}" + (f"_{target}" if target != kind else ""),
        kernel=layer_norm_kernel,
        arguments=Arguments,
        pointers={"x": kind, "weight": "fp32", "bias": "fp32", "normed": target},
        constants={"QMAX": QMAX_OF_KIND.get(target, 0), "BLOCK_H": hidden},
        grid=GRID,
        aligned=("weight", "bias", "normed"),
    )


VARIANTS = tuple(
    variant(kind, target, 4096) for kind in FLOATS for target in (kind, *(QMAX_OF_KIND if kind != "fp32" else ()))
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    inverse_scale: float = 1.0,
) -> torch.Tensor:
    """See `densegeo.kernels.layer_norm.layer_norm`."""
    batch, tokens, hidden = x.shape
    assert x.stride(2) == weight.stride(0) == bias.stride(0) == 1
    assert weight.shape == bias.shape == (hidden,)
    assert weight.dtype == bias.dtype == torch.float32
    assert dtype in QMAX_OF or inverse_scale == 1
    normed = torch.empty((batch, tokens, hidden), dtype=dtype, device=x.device)
    require_small(x, normed)
    strides = x.stride(0), x.stride(1)
    row = variant(kind_of(x.dtype), kind_of(dtype), triton.next_power_of_2(hidden))
    launch(row, Arguments(x, weight, bias, normed, tokens, hidden, *strides, eps, inverse_scale), batch)
    return normed
