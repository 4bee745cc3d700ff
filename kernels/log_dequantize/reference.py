"""`log_dequantize` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.sampling.reference import Box, plain


def log_dequantize(
    decoded: Tensor,
    box: Box,
    size: tuple[int, int],
    scale: float,
    shift: float,
    clamp_first: bool,
    depth_range: tuple[float, float],
    with_prediction: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `densegeo.kernels.log_dequantize.log_dequantize`."""
    exact = decoded.double()
    mean = exact.clamp(-1, 1).mean(dim=1) if clamp_first else exact.mean(dim=1).clamp(-1, 1)
    prediction = plain(mean / 2 + 0.5, box, size)
    depth = torch.exp(scale * prediction + shift).clamp(*depth_range).float()
    valid = depth.isfinite() & (depth > 0)
    depth = torch.where(valid, depth, torch.nan)
    return depth, valid, prediction.float() if with_prediction else None
