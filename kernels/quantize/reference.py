"""`quantize` in plain torch, float64 inside, and the rounding that other references end with."""

from __future__ import annotations

import torch
from torch import Tensor

QMAX_OF = {torch.float8_e4m3fn: 448, torch.int8: 127}  # largest magnitude of the quantized types


def rounded(value: Tensor, dtype: torch.dtype, inverse_scale: float) -> Tensor:
    """float64 values in `dtype`; an 8-bit one times inverse_scale, which must be 1 for others."""
    assert dtype in QMAX_OF or inverse_scale == 1
    if dtype in QMAX_OF:
        value = (value * inverse_scale).clamp(-QMAX_OF[dtype], QMAX_OF[dtype])
    if dtype == torch.int8:
        value = value.nan_to_num(0).round()
    return value.to(dtype)


def quantize(x: Tensor, dtype: torch.dtype, inverse_scale: float, out: Tensor | None) -> Tensor:
    """See `densegeo.kernels.quantize.quantize`."""
    assert dtype in QMAX_OF
    return placed(rounded(x.double(), dtype, inverse_scale), out)


def placed(result: Tensor, out: Tensor | None) -> Tensor:
    """A result, in `out` if there is one."""
    if out is None:
        return result
    assert out.shape == result.shape
    assert out.dtype == result.dtype
    return out.copy_(result)
