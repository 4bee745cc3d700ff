"""The depth colour map: near warm and light, far cool and dark, lightness strictly falling.

Lightness carries the order, so the map survives greyscale printing and colour blindness. Control points are in
OKLCh (Björn Ottosson, "A perceptual color space for image processing", 2020), joined by straight lines in OKLab.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

INVALID = (32, 32, 32)  # sRGB of pixels without a value
_SAMPLED = 200_000  # pixels that the percentiles are taken of, about

# position (0 = near), lightness, chroma, hue in degrees
_STOPS = np.array(
    [
        (0.00, 0.95, 0.09, 100),
        (0.25, 0.80, 0.14, 68),
        (0.50, 0.62, 0.17, 25),
        (0.75, 0.44, 0.16, -35),
        (1.00, 0.22, 0.11, -85),
    ]
)
_LAB_TO_LMS = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@lru_cache(maxsize=1)
def table() -> NDArray[np.uint8]:
    """(256, 3) sRGB, index 0 = near."""
    place, light, chroma, hue = _STOPS.T
    stops = np.stack([light, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], axis=1)
    at = np.linspace(0, 1, 256)
    lab = np.stack([np.interp(at, place, stops[:, axis]) for axis in range(3)], axis=1)
    linear = np.clip(((lab @ _LAB_TO_LMS.T) ** 3) @ _LMS_TO_RGB.T, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(np.round(255 * srgb), dtype=np.uint8)


def colorize(
    farness: NDArray[np.float32], valid: NDArray[np.bool_], ends: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """(H, W) values that grow with distance -> (H, W, 3) sRGB, stretched between `ends`, near and far.

    ends: by default the 2nd and 98th percentile, of every n-th pixel of a large image.
    """
    whole = bool(valid.all())
    if ends is None:
        step = int(max(1, np.sqrt(farness.size / _SAMPLED)))
        sample, valid_sample = farness[::step, ::step], valid[::step, ::step]
        sample = sample.ravel() if whole else sample[valid_sample]
        sample = sample if sample.size else farness[valid]
        if not sample.size:
            return np.full((*farness.shape, 3), INVALID, dtype=np.uint8)
        low, high = (float(value) for value in np.percentile(sample, (2, 98)))
    else:
        low, high = ends
    scaled = farness - np.float32(low)
    scaled *= np.float32(255 / max(high - low, 1e-12))
    scaled += np.float32(0.5)  # rounds where the cast cuts
    np.clip(scaled, 0, 255, out=scaled)
    index = (scaled if whole else np.where(valid, scaled, 0)).astype(np.uint8)
    result: NDArray[np.uint8] = np.take(table(), index, axis=0)
    if not whole:
        result[~valid] = INVALID
    return result
