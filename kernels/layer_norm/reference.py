"""`layer_norm` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.quantize.reference import rounded


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, inverse_scale: float = 1.0
) -> Tensor:
    """See `densegeo.kernels.layer_norm.layer_norm`."""
    exact = x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return rounded(centred / deviation * weight.double() + bias.double(), dtype, inverse_scale)
