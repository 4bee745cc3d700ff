"""Settings and checks that all kernel wrappers share."""

from __future__ import annotations

from typing import Any

from densegeo.errors import TensorSizeError

WARPS = 4
FP_FUSION = False  # no fused multiply-add: the interpreter has none, so the arithmetic tested is the arithmetic run
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": FP_FUSION}
MAX_OFFSET = 2**31 - 1  # kernels index with 32 bits


def require_small(*tensors: Any) -> None:
    """Raises TensorSizeError unless every element's offset fits 32 bits."""
    for tensor in tensors:
        reach = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if reach > MAX_OFFSET:
            raise TensorSizeError(f"a tensor of shape {tuple(tensor.shape)} is beyond the kernels' 32-bit offsets")
