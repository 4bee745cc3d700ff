"""What a launch of `split` takes."""

from __future__ import annotations

from typing import NamedTuple

from densegeo.kernels.contract import Pointer


class Arguments(NamedTuple):
    """Of `split_kernel`, in its order; shapes are there."""

    velocity: Pointer
    latents: Pointer
    batch: int
    rows: int
    columns: int
    features: int
    batch_stride: int
    token_stride: int
    scale: float
    shift: float
    first_factor: float
    second_factor: float
