"""`unproject` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def unproject(depth: Tensor, intrinsics: tuple[float, float, float, float], normals: Tensor | None) -> Tensor:
    """See `densegeo.kernels.unproject.unproject`."""
    fx, fy, cx, cy = intrinsics
    rows, columns = (torch.arange(size, dtype=torch.float64, device=depth.device) for size in depth.shape)
    z = depth.double()
    points = torch.stack([(columns - cx) / fx * z, (rows - cy)[:, None] / fy * z, z], dim=-1).float()
    return points if normals is None else torch.cat([points, normals], dim=-1)
