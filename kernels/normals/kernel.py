"""`normals` in one pass: a program makes a tile of one output picture."""

from functools import cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from densegeo.kernels.contract import Axis
from densegeo.kernels.launch import BOX, kind_of, launch, require_small
from densegeo.kernels.normals.arguments import Arguments
from densegeo.kernels.sampling.kernel import MAX_PRODUCT, clamp_unit, corners, mix
from densegeo.kernels.table import Variant
from densegeo.outputs import NORMAL_FLOOR, Matrix

if TYPE_CHECKING:
    import torch

BLOCK_X, BLOCK_Y = 128, 4
GRID = (Axis("width", BLOCK_X), Axis("height", BLOCK_Y), Axis("batch"))

FLOOR = tl.constexpr(NORMAL_FLOOR)


@triton.jit
def _clamped(pixel):
    return clamp_unit(tl.load(pixel).to(tl.float32))


@triton.jit
def _sample(plane, a, b, c, d, right, down):
    return mix(_clamped(plane + a), _clamped(plane + b), _clamped(plane + c), _clamped(plane + d), right, down)


@triton.jit(do_not_specialize=BOX)
def normals_kernel(
    decoded,  # (batch, 3, H, W)
    normals,  # (batch, height, width, 3) float32, contiguous
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    left,
    top,
    box_width,
    box_height,
    width,
    height,
    m00,  # matrix[0][0], and so on
    m01,
    m02,
    m10,
    m11,
    m12,
    m20,
    m21,
    m22,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    picture = tl.program_id(2)
    ends = corners(x, y, left, top, box_width, box_height, width, height, row_stride, column_stride)
    above0, above1, below0, below1, right, down = ends

    plane = decoded + picture * batch_stride
    a = _sample(plane, above0, above1, below0, below1, right, down)
    b = _sample(plane + channel_stride, above0, above1, below0, below1, right, down)
    c = _sample(plane + 2 * channel_stride, above0, above1, below0, below1, right, down)

    length = tl.sqrt(a * a + b * b + c * c)
    length = tl.where(length < FLOOR, FLOOR, length)  # NaN stays
    a /= length
    b /= length
    c /= length
    target = normals + ((picture * height + y[:, None]) * width + x[None, :]) * 3
    mask = (y < height)[:, None] & (x < width)[None, :]
    tl.store(target, m00 * a + m01 * b + m02 * c, mask=mask)
    tl.store(target + 1, m10 * a + m11 * b + m12 * c, mask=mask)
    tl.store(target + 2, m20 * a + m21 * b + m22 * c, mask=mask)


@cache
def variant(kind: str) -> Variant:
    return Variant(
        name=f"normals.{kind}",
        kernel=normals_kernel,
        arguments=Arguments,
        pointers={"decoded": kind, "normals": "fp32"},
        constants={"BLOCK_X": BLOCK_X, "BLOCK_Y": BLOCK_Y},
        grid=GRID,
        aligned=("decoded", "normals"),
        bundled=True,
    )


VARIANTS = (variant("fp32"),)


def normals(
    decoded: "torch.Tensor", box: tuple[int, int, int, int], size: tuple[int, int], matrix: Matrix
) -> "torch.Tensor":
    """See `densegeo.kernels.normals.normals`."""
    import torch

    batch, channels, rows, columns = decoded.shape
    (left, top, box_width, box_height), (width, height) = box, size
    assert channels == 3
    assert 0 <= left < left + box_width <= columns
    assert 0 <= top < top + box_height <= rows
    assert max(box_width * width, box_height * height) <= MAX_PRODUCT
    result = torch.empty((batch, height, width, 3), dtype=torch.float32, device=decoded.device)
    require_small(decoded, result)
    strides = decoded.stride(0), decoded.stride(1), decoded.stride(2), decoded.stride(3)
    entries = (float(entry) for row in matrix for entry in row)
    arguments = Arguments(decoded, result, *strides, *box, *size, *entries)
    launch(variant(kind_of(decoded.dtype)), arguments, batch)
    return result
