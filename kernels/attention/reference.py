"""`attention` in plain torch, float64 inside: each key's weight exp(logit) counts as often as its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int]) -> Tensor:
    """See `densegeo.kernels.attention.attention`."""
    multiplicity = torch.ones(k.shape[2], dtype=torch.float64, device=q.device)
    multiplicity[: len(counts)] = torch.tensor(counts, dtype=torch.float64)
    logits = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * multiplicity
    return (weight / weight.sum(-1, keepdim=True) @ v.double()).to(q.dtype)
