"""What all kernel wrappers share: the launch of a row through Triton, its settings and checks."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from densegeo.errors import TensorSizeError
from densegeo.kernels.contract import programs
from densegeo.kernels.table import Variant
from densegeo.precision import PRECISIONS

# Arguments of the kernels around the networks that differ from image to image. Where one becomes 1 or a multiple of 16,
# or stops being so, Triton compiles anew, half a second, unless told not to (`triton.jit`, do_not_specialize).
BOX = ("left", "top", "box_width", "box_height", "width", "height")
MAX_OFFSET = 2**31 - 1  # kernels index with 32 bits
# torch's name of a type -> Triton's; images are uint8
_KINDS = {f"torch.{row.torch}": row.triton for row in PRECISIONS.values()} | {"torch.uint8": "u8"}


@cache
def kind_of(dtype: Any) -> str:
    """A torch type's name in Triton: torch.bfloat16 -> "bf16"."""
    return _KINDS[str(dtype)]


def launch(variant: Variant, arguments: NamedTuple, batch: int = 1) -> None:
    """Launch a row's kernel on tensors: grid, constants and warps are the row's, order and names its arguments'.

    batch: pictures in the tensors, where no argument says so.
    """
    assert type(arguments) is variant.arguments
    extents = {axis.extent: getattr(arguments, axis.extent, batch) for axis in variant.grid}
    grid = programs(variant.grid, **extents)
    variant.kernel[grid](*arguments, **variant.constants, num_warps=variant.warps, enable_fp_fusion=variant.fp_fusion)


def require_small(*tensors: Any) -> None:
    """Raises TensorSizeError unless every element's offset fits 32 bits."""
    for tensor in tensors:
        reach = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if reach > MAX_OFFSET:
            raise TensorSizeError(f"a tensor of shape {tuple(tensor.shape)} is beyond the kernels' 32-bit offsets")
