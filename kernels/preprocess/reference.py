"""`preprocess` in plain torch, float64 inside: the resize is two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.colors import ColorRow, Ycbcr
from densegeo.kernels.sampling.reference import Box, antialiased_weights


def preprocess(frame: Tensor, size: tuple[int, int], box: Box, color: ColorRow, dtype: torch.dtype) -> Tensor:
    """See `densegeo.kernels.preprocess.preprocess`."""
    left, top, width, height = box
    if color.ycbcr is not None:
        pixels = from_ycbcr(frame, color.ycbcr)
    else:
        pixels = (frame.flip(2) if color.red else frame).permute(2, 0, 1).double()
    rgb = pixels / 255
    rows = antialiased_weights(rgb.shape[1], height).to(frame.device)
    columns = antialiased_weights(rgb.shape[2], width).to(frame.device)
    resized = rows @ rgb @ columns.mT
    y = (torch.arange(size[1], device=frame.device) - top).clamp(0, height - 1)
    x = (torch.arange(size[0], device=frame.device) - left).clamp(0, width - 1)
    return (resized[:, y][:, :, x] * 2 - 1)[None].to(dtype)


def from_ycbcr(frame: Tensor, ycbcr: Ycbcr) -> Tensor:
    """uint8 in one of the layouts -> RGB (3, h, w) float64 in [0, 255]."""
    width, height = ycbcr.size(frame.shape)
    if ycbcr.layout == "nv12":
        luma, pairs = frame[:height], frame[height:].reshape(height // 2, width // 2, 2)
        chroma = pairs.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    else:
        luma = frame[..., ycbcr.luma]
        chroma = frame[..., 1 - ycbcr.luma].reshape(height, width // 2, 2).repeat_interleave(2, dim=1)
    by = ycbcr.conversion
    y = (luma.double() - by.black) * by.gain
    u, v = chroma[..., 0].double() - 128, chroma[..., 1].double() - 128
    return torch.stack([y + by.red_v * v, y + by.green_u * u + by.green_v * v, y + by.blue_u * u]).clamp(0, 255)
