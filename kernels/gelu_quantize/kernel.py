"""`gelu_quantize` in one pass: a program makes a run of one token's features."""

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import programs
from densegeo.kernels.launch import OPTIONS, assert_small
from densegeo.kernels.quantize.kernel import BLOCK_F, GRID, LIMITS, rounded


@triton.jit
def gelu_quantize_kernel(
    x,  # (batch, tokens, features)
    result,  # as x
    tokens,
    features,
    x_batch_stride,
    x_token_stride,
    result_batch_stride,
    result_token_stride,
    inverse_scale,  # not read without LIMIT
    LIMIT: tl.constexpr,  # largest magnitude of a quantized result, 0 for others
    BLOCK_F: tl.constexpr,
):
    token = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    picture = tl.program_id(2)
    mask = feature < features
    source = x + picture * x_batch_stride + token * x_token_stride + feature
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    # 1 + tanh(u) = 2 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    value = value / (1 + tl.exp(-1.5957691216057308 * (value + 0.044715 * value * value * value)))
    value = rounded(value, inverse_scale, LIMIT)
    target = result + picture * result_batch_stride + token * result_token_stride + feature
    tl.store(target, value.to(result.dtype.element_ty), mask=mask)


def gelu_quantize(x: torch.Tensor, dtype: torch.dtype, inverse_scale: float, out: torch.Tensor | None) -> torch.Tensor:
    """See `densegeo.kernels.gelu_quantize.gelu_quantize`."""
    batch, tokens, features = x.shape
    result = torch.empty((batch, tokens, features), dtype=dtype, device=x.device) if out is None else out
    assert result.shape == x.shape
    assert result.dtype == dtype
    assert x.stride(2) == result.stride(2) == 1
    assert dtype in LIMITS or inverse_scale == 1
    assert_small(x, result)
    gelu_quantize_kernel[programs(GRID, tokens=tokens, features=features, batch=batch)](
        x,
        result,
        tokens,
        features,
        x.stride(0),
        x.stride(1),
        result.stride(0),
        result.stride(1),
        inverse_scale,
        LIMIT=LIMITS.get(dtype, 0),
        BLOCK_F=BLOCK_F,
        **OPTIONS,
    )
    return result
