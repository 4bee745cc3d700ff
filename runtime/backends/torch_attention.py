"""Attention with fp8 products as a module: what becomes of a quantized one on hardware that has them."""

from __future__ import annotations

from torch import Tensor, nn

from densegeo.kernels.attention import attention_fp8
from densegeo.kernels.quantize import quantize
from densegeo.models.layers import heads_first
from densegeo.models.quantized import ATTENTION, QuantizedAttention


class FusedAttention(nn.Module):
    """An attention whose products are fp8, on hardware that has them; q, k and v may be in 8 bits already."""

    DTYPE = ATTENTION.dtype

    def __init__(self, attention: QuantizedAttention, counts: list[int] | None = None) -> None:
        super().__init__()
        self.scales = float(attention.q_scale), float(attention.k_scale), float(attention.v_scale)
        self.dtype, self.counts = attention.q_scale.dtype, counts

    def rounded(self, x: Tensor, part: int) -> Tensor:
        """x (B, heads, T, size) of q, k or v (part 0, 1, 2) in 8 bits."""
        if x.dtype == self.DTYPE:
            return x
        if x.is_contiguous():
            return quantize(x.flatten(1, 2), self.DTYPE, 1 / self.scales[part]).view(x.shape)
        return heads_first(quantize(x.transpose(1, 2).flatten(2), self.DTYPE, 1 / self.scales[part]), x.shape[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """(B, heads, T, size) -> (B, T, heads * size). key_bias: not looked at; the counts tell it."""
        q, k, v = (self.rounded(x, part) for part, x in enumerate((q, k, v)))
        return attention_fp8(q, k, v, self.scales, self.dtype, self.counts).transpose(1, 2).flatten(2)
