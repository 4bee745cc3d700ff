"""`layer_norm` in plain torch, float64 inside."""

from __future__ import annotations

from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `densegeo.kernels.layer_norm.layer_norm`."""
    exact = x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (centred / deviation * weight.double() + bias.double()).to(x.dtype)
