"""tanh GELU of the MLP, written in the precision that the next linear reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.kernels.dispatch import implementation

if TYPE_CHECKING:
    import torch


def gelu_quantize(
    x: torch.Tensor,
    dtype: torch.dtype | None = None,
    inverse_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (B, T, F), features adjacent -> gelu(x) * inverse_scale, float32 inside, in `out`.

    dtype: default `out`'s, else x's. torch.float8_e4m3fn: to the nearest, saturated at +-448, NaN stays NaN; its
    kernel needs sm_89. torch.int8: to the nearest, ties to even, saturated at +-127, NaN becomes 0. With a floating
    dtype of 16 or 32 bits inverse_scale must be 1. inverse_scale: 1 / scale of the whole tensor, a constant.
    out: (B, T, F), features adjacent, for example the right part of a single block's [attention | MLP]; default
    contiguous. Source of the 448: Micikevicius et al. 2022, FP8 formats for deep learning.
    """
    return implementation(__name__, x).gelu_quantize(x, dtype or (x if out is None else out).dtype, inverse_scale, out)
