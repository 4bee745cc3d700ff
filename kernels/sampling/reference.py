"""Both bilinear resizes in plain torch, float64; half-pixel centres, edges clamped."""

from __future__ import annotations

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, width, height


def plain(pictures: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """(..., H, W) -> (..., height, width) float64 for size (width, height): crop the box, 2x2 taps always.

    A tap of weight 0 is not read, so that a NaN does not reach a neighbour that does not depend on it.
    """
    left, top, width, height = box
    cropped = pictures[..., top : top + height, left : left + width].double()
    return _interpolate(_interpolate(cropped, size[0]).mT, size[1]).mT


def _interpolate(rows: Tensor, target: int) -> Tensor:
    source = rows.shape[-1]
    position = (torch.arange(target, device=rows.device, dtype=torch.float64) + 0.5) * source / target - 0.5
    position = position.clamp(0, source - 1)
    first = position.floor().long()
    second = position.ceil().long()
    weight = position - first
    return rows[..., first] * (1 - weight) + rows[..., second] * weight


def antialiased_weights(source: int, target: int) -> Tensor:
    """(target, source) float64: row i holds the weights of output i; a triangle as wide as the larger pixel."""
    pixel = source / target
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * pixel
    distance = (torch.arange(source, dtype=torch.float64) + 0.5) - centres[:, None]
    weights = (1 - distance.abs() / max(pixel, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
