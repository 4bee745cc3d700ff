"""Four phases of a picture, interleaved into one of twice the size, channels-last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def interleave(phases: torch.Tensor) -> torch.Tensor:
    """phases (B, 4 C, H + 1, W + 1) -> (B, C, 2 H, 2 W), both in channels-last memory.

    Pixel (2 i + py, 2 j + px) of the result is pixel (i + py, j + px) of phase 2 py + px, C channels each: what
    `models.vae.PhaseUpsample` makes of its convolution.
    """
    return implementation(__name__, phases).interleave(phases)
