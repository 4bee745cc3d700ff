"""RMS norms and rotation of queries and keys, from the projection's layout to attention's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def qk_norm_rope(
    qkv: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    inverse_scales: tuple[float, float] = (1.0, 1.0),
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv (B, T, F), features adjacent and ordered (3, heads, size), more may follow -> q and k (B, heads, T, size).

    Each head's features are divided by their root mean square, multiplied by the scales (float32, (size,)), and
    adjacent pairs are rotated, (x0, x1) -> (c x0 - s x1, s x0 + c x1), by cos and sin (float32, (T, size / 2)).
    Results are contiguous, of qkv's dtype, float32 inside. Values need no kernel: attention reads them in place.
    out: where the results go instead, with a head's tokens adjacent: for example some tokens of a joint sequence.
    dtype: an 8-bit one as in `quantize`, in which the results are then, times their inverse scales.
    """
    return implementation(__name__, qkv).qk_norm_rope(
        qkv, query_scale, key_scale, cos, sin, heads, eps, dtype, inverse_scales, out
    )
