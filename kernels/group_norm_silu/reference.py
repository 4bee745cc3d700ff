"""`group_norm_silu` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """See `densegeo.kernels.group_norm_silu.group_norm_silu`."""
    exact = x.double().unflatten(1, (groups, -1))
    centred = exact - exact.mean((2, 3, 4), keepdim=True)
    deviation = (centred.square().mean((2, 3, 4), keepdim=True) + eps).sqrt()
    normed = (centred / deviation).flatten(1, 2) * weight.double()[:, None, None] + bias.double()[:, None, None]
    result = normed * normed.sigmoid() if silu else normed
    return result.to(dtype or x.dtype).contiguous(memory_format=torch.channels_last)
