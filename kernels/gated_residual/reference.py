"""`gated_residual` and `residual_layer_norm` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.layer_norm.reference import layer_norm


def _sum(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    return x.double() + (update.double() if gate is None else gate.double() * update.double())


def gated_residual(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """See `densegeo.kernels.gated_residual.gated_residual`."""
    return _sum(x, update, gate).to(x.dtype)


def residual_layer_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    inverse_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `densegeo.kernels.gated_residual.residual_layer_norm`."""
    residual = _sum(x, update, gate)
    return residual.to(x.dtype), layer_norm(residual, weight, bias, eps, dtype, inverse_scale)
