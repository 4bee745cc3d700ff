"""A tensor in 8 bits: what a quantized linear reads when no other kernel writes it so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def quantize(
    x: torch.Tensor, dtype: torch.dtype, inverse_scale: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (B, T, F), features adjacent -> x * inverse_scale in `dtype`, float32 before, in `out`.

    dtype: torch.float8_e4m3fn: to the nearest, saturated at +-448, NaN stays NaN; its kernel needs sm_89. torch.int8:
    to the nearest, ties to even, saturated at +-127, NaN becomes 0. inverse_scale: 1 / scale of the whole tensor.
    out: (B, T, F), features adjacent, for example the left part of a single block's [attention | MLP]; default
    contiguous. Source of the 448: Micikevicius et al. 2022, FP8 formats for deep learning.
    """
    return implementation(__name__, x).quantize(x, dtype, inverse_scale, out)
