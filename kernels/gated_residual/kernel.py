"""`gated_residual` and `residual_layer_norm`, one kernel, one pass: a program holds one token."""

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, programs
from densegeo.kernels.launch import OPTIONS, require_small
from densegeo.kernels.quantize.kernel import rounded
from densegeo.kernels.quantize.reference import LIMITS

GRID = (Axis("tokens"), Axis("batch"))


@triton.jit
def gated_residual_kernel(
    x,  # (batch, tokens, hidden), as update
    update,
    gate,  # (hidden,) float32; not read without GATED
    weight,  # (hidden,) float32, as bias; not read without NORM
    bias,
    residual,  # (batch, tokens, hidden), contiguous
    normed,  # as residual; not written without NORM
    tokens,
    hidden,
    x_batch_stride,
    x_token_stride,
    update_batch_stride,
    update_token_stride,
    eps,
    inverse_scale,  # not read without LIMIT
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    LIMIT: tl.constexpr,  # largest magnitude of an 8-bit norm, 0 for others
    BLOCK_H: tl.constexpr,  # hidden, rounded up to a power of two
):
    token = tl.program_id(0)
    picture = tl.program_id(1)
    feature = tl.arange(0, BLOCK_H)
    mask = feature < hidden
    source = x + picture * x_batch_stride + token * x_token_stride + feature
    added = update + picture * update_batch_stride + token * update_token_stride + feature
    value = tl.load(added, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        value = value * tl.load(gate + feature, mask=mask, other=0.0)
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32) + value
    target = (picture * tokens + token) * hidden + feature
    tl.store(residual + target, value.to(residual.dtype.element_ty), mask=mask)
    if NORM:
        centred = tl.where(mask, value - tl.sum(value, axis=0) / hidden, 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / hidden + eps)
        gain = tl.load(weight + feature, mask=mask, other=0.0)
        offset = tl.load(bias + feature, mask=mask, other=0.0)
        result = rounded(centred / deviation * gain + offset, inverse_scale, LIMIT)
        tl.store(normed + target, result.to(normed.dtype.element_ty), mask=mask)


def gated_residual(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """See `densegeo.kernels.gated_residual.gated_residual`."""
    return _launch(x, update, gate, None, 0.0, x.dtype, 1.0)[0]


def residual_layer_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    inverse_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `densegeo.kernels.gated_residual.residual_layer_norm`."""
    return _launch(x, update, gate, (weight, bias), eps, dtype, inverse_scale)


def _launch(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    dtype: torch.dtype,
    inverse_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, hidden = x.shape
    assert update.shape == x.shape
    assert update.dtype == x.dtype
    assert dtype in LIMITS or inverse_scale == 1
    assert x.stride(2) == update.stride(2) == 1
    for row in (gate, *(affine or ())):
        if row is not None:
            assert row.shape == (hidden,)
            assert row.dtype == torch.float32
            assert row.stride(0) == 1
    residual = torch.empty((batch, tokens, hidden), dtype=x.dtype, device=x.device)
    normed = residual if affine is None else torch.empty(residual.shape, dtype=dtype, device=x.device)
    weight, bias = affine or (residual, residual)
    require_small(x, update, residual)
    gated_residual_kernel[programs(GRID, tokens=tokens, batch=batch)](
        x,
        update,
        residual if gate is None else gate,
        weight,
        bias,
        residual,
        normed,
        tokens,
        hidden,
        x.stride(0),
        x.stride(1),
        update.stride(0),
        update.stride(1),
        eps,
        inverse_scale,
        GATED=gate is not None,
        NORM=affine is not None,
        LIMIT=LIMITS.get(dtype, 0),
        BLOCK_H=triton.next_power_of_2(hidden),
        **OPTIONS,
    )
    return residual, normed
