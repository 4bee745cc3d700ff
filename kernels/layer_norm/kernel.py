"""`layer_norm` in one pass: a program holds one token."""

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, programs
from densegeo.kernels.launch import OPTIONS, require_small
from densegeo.kernels.quantize.kernel import rounded
from densegeo.kernels.quantize.reference import LIMITS

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
    inverse_scale,  # not read without LIMIT
    LIMIT: tl.constexpr,  # largest magnitude of an 8-bit result, 0 for others
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
    result = rounded(centred / deviation * gain + offset, inverse_scale, LIMIT)
    target = normed + (picture * tokens + token) * hidden + feature
    tl.store(target, result.to(normed.dtype.element_ty), mask=mask)


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
    assert dtype in LIMITS or inverse_scale == 1
    normed = torch.empty((batch, tokens, hidden), dtype=dtype, device=x.device)
    require_small(x, normed)
    layer_norm_kernel[programs(GRID, tokens=tokens, batch=batch)](
        x,
        weight,
        bias,
        normed,
        tokens,
        hidden,
        x.stride(0),
        x.stride(1),
        eps,
        inverse_scale,
        LIMIT=LIMITS.get(dtype, 0),
        BLOCK_H=triton.next_power_of_2(hidden),
        **OPTIONS,
    )
    return normed
