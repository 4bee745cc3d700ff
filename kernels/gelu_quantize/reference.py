"""`gelu_quantize` in plain torch, float64 inside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from densegeo.kernels.quantize.reference import placed, rounded


def gelu_quantize(x: Tensor, dtype: torch.dtype, inverse_scale: float, out: Tensor | None) -> Tensor:
    """See `densegeo.kernels.gelu_quantize.gelu_quantize`."""
    exact = x.double()
    value = exact / 2 * (1 + (math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)).tanh())
    return placed(rounded(value, dtype, inverse_scale), out)
