"""Settings and checks that all kernel wrappers share."""

from __future__ import annotations

from typing import Any

from densegeo.errors import TensorSizeError

WARPS = 4
FP_FUSION = False  # no fused multiply-add: the interpreter has none, so the arithmetic tested is the arithmetic run
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": FP_FUSION}
# Arguments of the kernels around the networks that differ from image to image. Where one becomes 1 or a multiple of 16,
# or stops being so, Triton compiles anew, half a second, unless told not to (`triton.jit`, do_not_specialize).
BOX = ("left", "top", "box_width", "box_height", "width", "height")
MAX_OFFSET = 2**31 - 1  # kernels index with 32 bits


def require_small(*tensors: Any) -> None:
    """Raises TensorSizeError unless every element's offset fits 32 bits."""
    for tensor in tensors:
        reach = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if reach > MAX_OFFSET:
            raise TensorSizeError(f"a tensor of shape {tuple(tensor.shape)} is beyond the kernels' 32-bit offsets")
