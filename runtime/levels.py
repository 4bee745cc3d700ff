"""Values of pixels: from the range that they have to [0, 1], and a warning where they use a small part of it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import number_of, shown
from densegeo.errors import ConfigError, ImageError, ImageWarning

Range = tuple[float, float]  # the values of black and of white
_DEPTHS = (8, 10, 12, 14)  # bits that cameras put into types of more
_SPARSE = 8  # a step of rows and columns: a glance at an image whose type is fully used as a rule


def check_range(value_range: object) -> None:
    """Raises ConfigError for anything but None and two finite numbers, the smaller one first."""
    if value_range is None:
        return
    try:
        low, high = (number_of(value) for value in value_range)  # type: ignore[attr-defined]
        is_range = low is not None and high is not None and bool(np.isfinite([low, high]).all()) and low < high
    except (TypeError, ValueError):
        is_range = False
    if not is_range:
        raise ConfigError(
            "value_range must be the values of black and of white, such as (0, 4095) for an image of 12 bits, not "
            f"{shown(value_range)}."
        )


def to_unit(array: NDArray[Any], value_range: Range, name: str) -> NDArray[np.float32]:
    """Values in `value_range` -> [0, 1]; those outside are clipped. Warns (ImageWarning) where they use a small part.

    Raises ImageError for NaN and for no numbers.
    """
    if array.dtype.kind not in "uif":
        raise ImageError(f"{name} has dtype {array.dtype}, which is no number that has a range.")
    values = array.astype(np.float64 if array.dtype.itemsize > 2 else np.float32)
    if not np.isfinite(values).all():
        raise ImageError(f"{name} contains NaN or infinite pixels. Replace them, for example with `np.nan_to_num`.")
    low, high = value_range
    scaled: NDArray[np.float32] = np.clip((values - low) / (high - low), 0.0, 1.0).astype(np.float32)
    if 0 < (top := float(scaled.max())) <= 1 / 16:
        warnings.warn(
            f"An image has no value above {low + top * (high - low):g}, and value_range says that {high:g} is white. "
            "It is taken as it is, nearly black.",
            ImageWarning,
            stacklevel=2,
        )
    return scaled


def warn_of_small_range(array: NDArray[Any], largest: float) -> None:
    """Warn (ImageWarning) where no pixel comes near `largest`, white in this type, as if it were another type's.

    Integers of 16 bits in at most 14 of them; of 8 bits in 4; floats below 1/16, as 12 bits divided by 65535 are.
    Python shows equal warnings once, so that a camera's frames do not fill a log.
    """
    limit = largest / 4 if largest == 65535 else largest / 16
    if largest != 65535 and array[::_SPARSE, ::_SPARSE].max() >= limit:
        return
    top = float(array.max())
    if not 0 < top <= limit:  # all black says nothing
        return
    if largest == 65535:
        bits = int(top).bit_length()
        depth = next(depth for depth in _DEPTHS if depth >= bits)
        used = f"uses {bits} of its 16 bits. If it is an image of {depth} bits, say value_range=(0, {2**depth - 1})"
    elif largest == 255:
        used = (
            f"has no value above {2 ** int(top).bit_length() - 1} of 255. If its white is another number, say so with "
            "value_range=(0, white); a float image must be multiplied by 255 before it becomes uint8"
        )
    else:
        used = (
            "has no value above 1/16, where white is 1. If it was divided by too much (12 bits by 65535, or twice by "
            "255), say so with value_range=(0, white)"
        )
    warnings.warn(f"An image {used}. It is taken as it is, nearly black.", ImageWarning, stacklevel=2)
