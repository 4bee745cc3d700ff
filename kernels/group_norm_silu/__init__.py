"""GroupNorm and SiLU of the autoencoder, channels-last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x (B, C, H, W) in channels-last memory -> the same shape and memory format; float32 inside.

    weight, bias: float32 (C,). Statistics are merged block by block (Chan, Golub and LeVeque 1983), so that a large
    mean costs no precision. silu: apply x * sigmoid(x) too; without it this is the norm in front of attention.
    dtype: of the result, if not x's: float32 where what follows stays in it.
    """
    return implementation(__name__, x).group_norm_silu(x, weight, bias, groups, eps, silu, dtype)
