"""`quantize` and `gelu_quantize` in one pass: a program makes a run of one token's features.

`rounded` also ends other kernels.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, Pointer
from densegeo.kernels.launch import kind_of, launch, require_small
from densegeo.kernels.quantize.reference import QMAX_OF
from densegeo.kernels.table import Variant

BLOCK_F = 2048  # features a program
GRID = (Axis("tokens"), Axis("features", BLOCK_F), Axis("batch"))
QMAX_OF_KIND = {kind_of(dtype): qmax for dtype, qmax in QMAX_OF.items()}  # by Triton's name of the type
TO_INTEGER = tl.constexpr(1.5 * 2**23)  # adding it to a float32 below 2^22 rounds to an integer, ties to even


@triton.jit
def rounded(value, inverse_scale, QMAX: tl.constexpr):
    """float32 values that only have to be converted to a type of 8 bits, which QMAX tells; as they are for QMAX 0."""
    if QMAX > 0:
        value *= inverse_scale
        value = tl.where(value > QMAX, QMAX, tl.where(value < -QMAX, -QMAX, value))  # NaN stays
    if QMAX == 127:  # int8
        value = tl.where(value == value, value, 0.0) + TO_INTEGER - TO_INTEGER
    return value


@triton.jit
def quantize_kernel(
    x,  # (batch, tokens, features)
    result,  # as x
    tokens,
    features,
    x_batch_stride,
    x_token_stride,
    result_batch_stride,
    result_token_stride,
    inverse_scale,  # not read without QMAX
    GELU: tl.constexpr,
    QMAX: tl.constexpr,  # largest magnitude of a quantized result, 0 for others
    BLOCK_F: tl.constexpr,
):
    token = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    picture = tl.program_id(2)
    mask = feature < features
    source = x + picture * x_batch_stride + token * x_token_stride + feature
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # 1 + tanh(u) = 2 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        value = value / (1 + tl.exp(-1.5957691216057308 * (value + 0.044715 * value * value * value)))
    value = rounded(value, inverse_scale, QMAX)
    target = result + picture * result_batch_stride + token * result_token_stride + feature
    tl.store(target, value.to(result.dtype.element_ty), mask=mask)


class Arguments(NamedTuple):
    """Of `quantize_kernel`."""

    x: Pointer
    result: Pointer
    tokens: int
    features: int
    x_batch_stride: int
    x_token_stride: int
    result_batch_stride: int
    result_token_stride: int
    inverse_scale: float


@cache
def variant(source: str, target: str, gelu: bool) -> Variant:
    """features and strides are multiples of 16."""
    return Variant(
        name=f"{'gelu_quantize' if gelu else 'quantize'}.{source}_{target}",
        kernel=quantize_kernel,
        arguments=Arguments,
        pointers={"x": source, "result": target},
        constants={"GELU": gelu, "QMAX": QMAX_OF_KIND.get(target, 0), "BLOCK_F": BLOCK_F},
        grid=GRID,
        aligned=tuple(name for name in Arguments._fields if name not in ("tokens", "inverse_scale")),
    )


VARIANTS = tuple(variant(source, target, gelu=False) for source in ("bf16", "fp16") for target in QMAX_OF_KIND)


def quantize(x: torch.Tensor, dtype: torch.dtype, inverse_scale: float, out: torch.Tensor | None) -> torch.Tensor:
    """See `densegeo.kernels.quantize.quantize`."""
    assert dtype in QMAX_OF
    return run(x, dtype, inverse_scale, out, gelu=False)


def run(
    x: torch.Tensor, dtype: torch.dtype, inverse_scale: float, out: torch.Tensor | None, *, gelu: bool
) -> torch.Tensor:
    """x (B, T, F) -> itself or its GELU, in `dtype`, in `out`."""
    batch, tokens, features = x.shape
    result = torch.empty((batch, tokens, features), dtype=dtype, device=x.device) if out is None else out
    assert result.shape == x.shape
    assert result.dtype == dtype
    assert x.stride(2) == result.stride(2) == 1
    assert dtype in QMAX_OF or inverse_scale == 1
    require_small(x, result)
    strides = x.stride(0), x.stride(1), result.stride(0), result.stride(1)
    row = variant(kind_of(x.dtype), kind_of(dtype), gelu)
    launch(row, Arguments(x, result, tokens, features, *strides, inverse_scale), batch)
    return result
