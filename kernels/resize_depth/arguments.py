"""What a launch of `resize_depth` takes, and the names of its compiled rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from densegeo.kernels.contract import Pointer
from densegeo.outputs import Clamp, Space


@dataclass(frozen=True)
class Metres:
    """Depth in metres from a prediction p: line = scale * p + shift, and depth clipped to [near, far] metres.

    space: "log_affine" depth = exp(line), "affine" depth = line, "disparity_affine" depth = 1 / line.
    """

    space: Space
    scale: float
    shift: float
    near: float = 0.0
    far: float = inf


class Arguments(NamedTuple):
    """Of `resize_depth_kernel`, in its order; shapes are there. A prediction needs neither line nor range."""

    decoded: Pointer
    resized: Pointer
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
    scale: float = 1.0
    shift: float = 0.0
    near: float = 0.0
    far: float = inf


def row_name(kind: str, channels: int, clamp: Clamp, space: Space | None = None) -> str:
    """ "resize_depth.before_mean3_fp32"; "resize_depth.before_mean3_fp32_log_affine" of metres."""
    return f"resize_depth.{clamp}{channels}_{kind}" + (f"_{space}" if space else "")
