"""What a launch of `normals` takes."""

from __future__ import annotations

from typing import NamedTuple

from densegeo.kernels.contract import Pointer


class Arguments(NamedTuple):
    """Of `normals_kernel`, in its order; shapes are there. matrix[0][0] is m00."""

    decoded: Pointer
    normals: Pointer
    batch_stride: int
    channel_stride: int
    row_stride: int
    column_stride: int
    left: int
    top: int
    box_width: int
    box_height: int
    width: int
    height: int
    m00: float
    m01: float
    m02: float
    m10: float
    m11: float
    m12: float
    m20: float
    m21: float
    m22: float
