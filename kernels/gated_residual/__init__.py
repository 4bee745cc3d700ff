"""The residual stream's addition, alone or together with the affine LayerNorm that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def gated_residual(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """x + gate * update: x, update (B, T, hidden), features adjacent -> contiguous, of x's dtype, float32 inside.

    gate: float32 (hidden,), or None when it lies in the rows of the linear that made the update (DESIGN 4.2).
    """
    if x.is_cuda:
        from densegeo.kernels.gated_residual.kernel import gated_residual as run
    else:
        from densegeo.kernels.gated_residual.reference import gated_residual as run
    return run(x, update, gate)


def residual_layer_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    inverse_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_residual` and its `layer_norm`: (new residual, normed residual), one reading and two writings.

    weight, bias: float32 (hidden,). The norm sees the sum before it is rounded to x's dtype.
    dtype, inverse_scale: an 8-bit type for the normed residual, see `kernels.quantize`.
    """
    if x.is_cuda:
        from densegeo.kernels.gated_residual.kernel import residual_layer_norm as run
    else:
        from densegeo.kernels.gated_residual.reference import residual_layer_norm as run
    return run(x, update, gate, weight, bias, eps, dtype or x.dtype, inverse_scale)
