"""`residual_layer_norm` in one pass: a program holds one token."""

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
def residual_layer_norm_kernel(
    x,  # (batch, tokens, hidden), as update
    update,
    weight,  # (hidden,) float32, as bias
    bias,
    residual,  # (batch, tokens, hidden), contiguous, as normed
    normed,
    tokens,
    hidden,
    x_batch_stride,
    x_token_stride,
    update_batch_stride,
    update_token_stride,
    eps,
    inverse_scale,  # not read without QMAX
    QMAX: tl.constexpr,  # largest magnitude of an 8-bit norm, 0 for others
    BLOCK_H: tl.constexpr,  # hidden, rounded up to a power of two
):
    token = tl.program_id(0)
    picture = tl.program_id(1)
    feature = tl.arange(0, BLOCK_H)
    mask = feature < hidden
    source = x + picture * x_batch_stride + token * x_token_stride + feature
    added = update + picture * update_batch_stride + token * update_token_stride + feature
    value = tl.load(added, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32) + value
    target = (picture * tokens + token) * hidden + feature
    tl.store(residual + target, value.to(residual.dtype.element_ty), mask=mask)
    centred = tl.where(mask, value - tl.sum(value, axis=0) / hidden, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / hidden + eps)
    gain = tl.load(weight + feature, mask=mask, other=0.0)
    offset = tl.load(bias + feature, mask=mask, other=0.0)
    result = rounded(centred / deviation * gain + offset, inverse_scale, QMAX)
    tl.store(normed + target, result.to(normed.dtype.element_ty), mask=mask)


class Arguments(NamedTuple):
    """Of `residual_layer_norm_kernel`."""

    x: Pointer
    update: Pointer
    weight: Pointer
    bias: Pointer
    residual: Pointer
    normed: Pointer
    tokens: int
    hidden: int
    x_batch_stride: int
    x_token_stride: int
    update_batch_stride: int
    update_token_stride: int
    eps: float
    inverse_scale: float


@cache
def variant(kind: str, target: str, hidden: int) -> Variant:
    """target: of the norm. hidden: rounded up to a power of two; it and strides are multiples of 16."""
    return Variant(
        name=f"residual_layer_norm.{kind}" + (f"_{target}" if target != kind else ""),
        kernel=residual_layer_norm_kernel,
        arguments=Arguments,
        pointers={
            **dict.fromkeys(("x", "update", "residual"), kind),
            **dict.fromkeys(("weight", "bias"), "fp32"),
            "normed": target,
        },
        constants={"QMAX": QMAX_OF_KIND.get(target, 0), "BLOCK_H": hidden},
        grid=GRID,
        aligned=tuple(name for name in Arguments._fields if name not in ("tokens", "eps", "inverse_scale")),
    )


VARIANTS = tuple(
    variant(kind, target, 4096) for kind in FLOATS for target in (kind, *(QMAX_OF_KIND if kind != "fp32" else ()))
)


def residual_layer_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    inverse_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `densegeo.kernels.residual_layer_norm.residual_layer_norm`."""
    batch, tokens, hidden = x.shape
    assert update.shape == x.shape
    assert update.dtype == x.dtype
    assert dtype in QMAX_OF or inverse_scale == 1
    assert x.stride(2) == update.stride(2) == 1
    assert weight.shape == bias.shape == (hidden,)
    assert weight.dtype == bias.dtype == torch.float32
    assert weight.stride(0) == bias.stride(0) == 1
    residual = torch.empty((batch, tokens, hidden), dtype=x.dtype, device=x.device)
    normed = torch.empty((batch, tokens, hidden), dtype=dtype, device=x.device)
    require_small(x, update, residual)
    strides = x.stride(0), x.stride(1), update.stride(0), update.stride(1)
    row = variant(kind_of(x.dtype), kind_of(dtype), triton.next_power_of_2(hidden))
    arguments = Arguments(
        x, update, weight, bias, residual, normed, tokens, hidden, *strides, eps=eps, inverse_scale=inverse_scale
    )
    launch(row, arguments, batch)
    return residual, normed
