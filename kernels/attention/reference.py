"""`attention` and `attention_fp8` in plain torch, float64 inside: each key's weight counts as often as its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densegeo.kernels.quantize.reference import QMAX_OF


def attention(q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int]) -> Tensor:
    """See `densegeo.kernels.attention.attention`."""
    weight = _weights(q.double(), k.double(), counts)
    return (weight / weight.sum(-1, keepdim=True) @ v.double()).to(q.dtype)


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[float, float, float], dtype: torch.dtype, counts: Sequence[int]
) -> Tensor:
    """See `densegeo.kernels.attention.attention_fp8`."""
    assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn
    query, key, value = (x.double() * scale for x, scale in zip((q, k, v), scales, strict=True))
    weight = _weights(query, key, counts)
    qmax = QMAX_OF[q.dtype]
    rounded = (weight * qmax).to(q.dtype).double() / qmax
    return (rounded @ value / weight.sum(-1, keepdim=True)).to(dtype)


def _weights(q: Tensor, k: Tensor, counts: Sequence[int]) -> Tensor:
    """exp(logit) times multiplicity, for each query divided by the largest."""
    multiplicity = torch.ones(k.shape[2], dtype=torch.float64, device=q.device)
    multiplicity[: len(counts)] = torch.tensor(counts, dtype=torch.float64)
    logits = q @ k.mT / q.shape[-1] ** 0.5 + multiplicity.log()
    return (logits - logits.amax(-1, keepdim=True)).exp()
