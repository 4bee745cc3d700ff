"""`interleave` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def interleave(phases: Tensor) -> Tensor:
    """See `densegeo.kernels.interleave.interleave`."""
    batch, channels, height, width = phases.shape
    shape = batch, channels // 4, 2 * (height - 1), 2 * (width - 1)
    result = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)
    for index, phase in enumerate(phases.chunk(4, dim=1)):
        row, column = divmod(index, 2)
        result[:, :, row::2, column::2] = phase[:, :, row : row + height - 1, column : column + width - 1]
    return result
