"""`residual_layer_norm` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.layer_norm.reference import layer_norm


def residual_layer_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    inverse_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `densegeo.kernels.residual_layer_norm.residual_layer_norm`."""
    residual = x.double() + update.double()
    return residual.to(x.dtype), layer_norm(residual, weight, bias, eps, dtype, inverse_scale)
