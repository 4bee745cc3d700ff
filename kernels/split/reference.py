"""`split` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def split(
    velocity: Tensor,
    height: int,
    width: int,
    scale: float,
    shift: float,
    first_factor: float,
    second_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `densegeo.kernels.split.split`."""
    depth, normals = velocity.double().chunk(2, dim=1)
    tokens = torch.cat([first_factor * depth, second_factor * normals])
    rows, columns, channels = height // 16, width // 16, velocity.shape[2] // 4
    grid = tokens.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    latents = grid.reshape(-1, channels, 2 * rows, 2 * columns)
    return (latents / scale + shift).to(dtype)
