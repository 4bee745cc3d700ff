"""`normals` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.sampling.reference import Box, plain
from densegeo.outputs import NORMAL_FLOOR, Matrix


def normals(decoded: Tensor, box: Box, size: tuple[int, int], matrix: Matrix) -> Tensor:
    """See `densegeo.kernels.normals.normals`."""
    resized = plain(decoded.double().clamp(-1, 1), box, size)
    unit = resized / resized.norm(dim=1, keepdim=True).clamp(min=NORMAL_FLOOR)
    rotation = torch.tensor(matrix, dtype=torch.float64, device=decoded.device)
    return torch.einsum("ij,bjhw->bhwi", rotation, unit).float().contiguous()
