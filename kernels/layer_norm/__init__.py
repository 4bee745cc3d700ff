"""LayerNorm with a folded modulation: the affine norm in front of attention and MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    inverse_scale: float = 1.0,
) -> torch.Tensor:
    """x (B, T, hidden), features adjacent -> (B, T, hidden) contiguous, of x's dtype, float32 inside.

    weight, bias: float32 (hidden,), "1 + scale" and "shift" of AdaLN once they are constants (DESIGN 4.2).
    dtype, inverse_scale: an 8-bit type for a quantized linear, see `kernels.quantize`.
    """
    return implementation(__name__, x).layer_norm(x, weight, bias, eps, dtype or x.dtype, inverse_scale)
