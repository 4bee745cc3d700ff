"""Velocity tokens -> the decoder's unscaled latents, both halves as one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def split(
    velocity: torch.Tensor,
    height: int,
    width: int,
    *,
    scale: float = 0.3611,
    shift: float = 0.1159,
    first_factor: float = -1.0,
    second_factor: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Velocity (B, 2L, 4C) -> latents (2B, C, height/8, width/8): B depth latents first, then B normal latents.

    L = (height/16)(width/16), height and width in pixels; tokens unpack as "(h w) (c 2 2) -> c (h 2) (w 2)". Each
    half is multiplied by its sign, divided by `scale`, then `shift` is added. dtype: of the result, default the
    input's.
    """
    return implementation(__name__, velocity).split(
        velocity, height, width, scale, shift, first_factor, second_factor, dtype or velocity.dtype
    )
