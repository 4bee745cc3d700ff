"""The residual stream's addition together with the affine LayerNorm that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def residual_layer_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    inverse_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, update (B, T, hidden), features adjacent -> (x + update, its `layer_norm`): one reading and two writings.

    Both are contiguous and of x's dtype, float32 inside; the norm sees the sum before it is rounded. A gate on the
    update lies in the rows of the linear that made it (DESIGN 4.2). weight, bias: float32 (hidden,).
    dtype, inverse_scale: an 8-bit type for the normed residual, see `kernels.quantize`.
    """
    run = implementation(__name__, x).residual_layer_norm
    return run(x, update, weight, bias, eps, dtype or x.dtype, inverse_scale)
