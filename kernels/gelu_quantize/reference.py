"""`gelu_quantize` in plain torch, float64 inside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMITS = {torch.float8_e4m3fn: 448, torch.int8: 127}  # largest magnitude of the quantized types


def gelu_quantize(x: Tensor, dtype: torch.dtype, inverse_scale: float, out: Tensor | None) -> Tensor:
    """See `densegeo.kernels.gelu_quantize.gelu_quantize`."""
    assert dtype in LIMITS or inverse_scale == 1
    exact = x.double()
    value = exact / 2 * (1 + (math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)).tanh())
    if dtype in LIMITS:
        value = (value * inverse_scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    if dtype == torch.int8:
        value = value.nan_to_num(0).round()
    result = value.to(dtype)
    if out is None:
        return result
    assert out.shape == x.shape
    assert out.dtype == dtype
    return out.copy_(result)
