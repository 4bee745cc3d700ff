"""`qk_norm_rope` in plain torch, float64 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.quantize.reference import placed, rounded


def qk_norm_rope(
    qkv: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    dtype: torch.dtype | None = None,
    inverse_scales: tuple[float, float] = (1.0, 1.0),
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `densegeo.kernels.qk_norm_rope.qk_norm_rope`."""
    size = len(query_scale)
    parts = qkv[..., : 2 * heads * size].double().unflatten(-1, (2, heads, size)).permute(2, 0, 3, 1, 4)
    query, key = (
        rounded(
            _rotate(part * (part.square().mean(-1, keepdim=True) + eps).rsqrt() * scale.double(), cos, sin),
            dtype or qkv.dtype,
            inverse_scale,
        )
        for part, scale, inverse_scale in zip(parts, (query_scale, key_scale), inverse_scales, strict=True)
    )
    first, second = out or (None, None)
    return placed(query, first), placed(key, second)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos.double(), sin.double())
    return torch.view_as_real(turned).flatten(-2)
