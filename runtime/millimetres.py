"""Depth as images of 16 bits hold it: whole millimetres, 0 where there is none (REP 118)."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

MILLIMETRES_MAX = 65535  # the largest number of 16 bits

log = logging.getLogger("densegeo")


def to_millimetres(depth: NDArray[np.float32], name: str) -> NDArray[np.uint16]:
    """(H, W) metres, NaN where there is none -> (H, W) uint16. The log says, under `name`, how much was cut off."""
    thousandths = np.round(np.nan_to_num(depth.astype(np.float64), nan=0.0) * 1000)
    beyond = thousandths > MILLIMETRES_MAX
    if count := int(beyond.sum()):
        log.warning(
            "%s: %.3g %% of the pixels lie beyond %s m, more than 16 bits of millimetres hold: they are 0. "
            "npy, npz and exr keep them.",
            name,
            100 * count / beyond.size,
            MILLIMETRES_MAX / 1000,
        )
    thousandths[beyond] = 0
    return thousandths.astype(np.uint16)
