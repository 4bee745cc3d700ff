"""`resize_depth` in plain torch, float64 inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.kernels.sampling.reference import Box, plain
from densegeo.outputs import Clamp, Space

DEPTH: dict[Space, Callable[[Tensor], Tensor]] = {
    "log_affine": torch.exp,
    "affine": lambda line: line,
    "disparity_affine": torch.reciprocal,
}


def resize_depth(
    decoded: Tensor, box: Box, size: tuple[int, int], clamp: Clamp, metres: Metres | None = None
) -> Tensor:
    """See `densegeo.kernels.resize_depth.resize_depth`."""
    exact = decoded.double()
    mean = exact.clamp(-1, 1).mean(dim=1) if clamp == "before_mean" else exact.mean(dim=1).clamp(-1, 1)
    prediction = plain(mean / 2 + 0.5, box, size)
    if metres is None:
        return prediction.float()
    depth = DEPTH[metres.space](metres.scale * prediction + metres.shift).float()
    valid = depth.isfinite() & (depth > 0)
    return torch.where(valid, depth.clamp(metres.near, metres.far), torch.nan)
