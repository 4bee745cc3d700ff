"""`preprocess` in plain torch, float64 inside: the resize is two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.sampling.reference import Box, antialiased_weights


def preprocess(frame: Tensor, size: tuple[int, int], box: Box, bgr: bool, dtype: torch.dtype) -> Tensor:
    """See `densegeo.kernels.preprocess.preprocess`."""
    left, top, width, height = box
    rgb = (frame.flip(2) if bgr else frame).permute(2, 0, 1).double() / 255
    rows = antialiased_weights(frame.shape[0], height).to(frame.device)
    columns = antialiased_weights(frame.shape[1], width).to(frame.device)
    resized = rows @ rgb @ columns.mT
    y = (torch.arange(size[1], device=frame.device) - top).clamp(0, height - 1)
    x = (torch.arange(size[0], device=frame.device) - left).clamp(0, width - 1)
    return (resized[:, y][:, :, x] * 2 - 1)[None].to(dtype)
