"""A network's outputs as they would be with known errors: exact predictions and normals plus smooth Gaussian noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from densegeo.runtime.geometry import Geometry
from densegeo.size import Size
from densegeo.training.render import View

SMOOTH = 8.0  # pixels, the standard deviation of the filter that makes white noise smooth
NOISES = ((0.0, 0.0), (0.002, 2.0), (0.005, 5.0), (0.01, 10.0))  # of p; RMS angle of normals, degrees


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """(..., H, W) of standard deviation 1."""
    frequency = np.fft.fftfreq(shape[-2])[:, None] ** 2 + np.fft.rfftfreq(shape[-1])[None] ** 2
    kernel = np.exp(-2 * np.pi**2 * SMOOTH**2 * frequency)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * kernel, s=shape[-2:])
    return np.asarray(noise / noise.std(axis=(-2, -1), keepdims=True))


def observed(view: View, rng: np.random.Generator, noise: float, degrees: float) -> tuple[Geometry, float]:
    """What a network that errs so would give, and the true scale.

    p is ln(depth) between its 2nd and 98th percentile, as in FE2E's training, plus noise, clipped to [0, 1].
    """
    logarithm = np.log(np.where(view.valid, view.depth, 1).astype(np.float64))
    low, high = np.percentile(logarithm[view.valid], (2, 98))
    p = np.where(view.valid, (logarithm - low) / (high - low), 1.0)
    normals = view.normals.astype(np.float64)
    if noise:
        p = p + noise * smooth_noise(rng, p.shape)
    if degrees:
        turn = np.moveaxis(smooth_noise(rng, (3, *p.shape)), 0, -1)
        turn -= (turn * normals).sum(axis=-1, keepdims=True) * normals  # two components, each degrees / sqrt(2)
        normals = normals + np.tan(np.radians(degrees) / np.sqrt(2)) * turn
        normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    height, width = p.shape
    clipped = np.clip(p, 0, 1).astype(np.float32)
    everywhere = np.ones(p.shape, dtype=bool)
    return Geometry(clipped, "log_affine", normals.astype(np.float32), everywhere, Size(width, height)), high - low


def shape_error(view: View, depth: NDArray[np.float32]) -> float:
    """AbsRel of depth in any unit, after aligning the median of its logarithm."""
    gap = np.log(depth[view.valid].astype(np.float64)) - np.log(view.depth[view.valid].astype(np.float64))
    return float(np.mean(np.abs(np.expm1(gap - np.median(gap)))))
