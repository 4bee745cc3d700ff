"""Magnitudes of one activation as a histogram, and four ways to choose from it the range that 8 bits shall cover."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import QuantizationError

BINS = 2048
PERCENTILE = 99.99
CANDIDATES = 64  # ranges that `mse` and `entropy` try, as shares of the largest magnitude
LOWEST = 0.2  # the smallest of these shares

Array = NDArray[np.generic]
Float64 = NDArray[np.float64]
Rounded = Callable[[Float64, float], Float64]  # values, range -> the values as 8 bits with that range give them back


class Histogram:
    """Counts of magnitudes in equal bins from 0 to `upper_edge`, which doubles when something larger comes."""

    def __init__(self, counts: NDArray[np.int64] | None = None, upper_edge: float = 0.0, amax: float = 0.0) -> None:
        self.counts = np.zeros(BINS, np.int64) if counts is None else counts
        self.upper_edge, self.amax = upper_edge, amax

    def add(self, activations: Array, every: int = 1) -> None:
        """Count an array's magnitudes, those of one row in `every`; the largest one is that of all.

        Raises QuantizationError for what is not finite.
        """
        floats = np.asarray(activations, dtype=np.float32)
        amax = max(float(floats.max(initial=0.0)), -float(floats.min(initial=0.0)))
        magnitudes = np.abs(floats[::every]).ravel()
        if not np.isfinite(amax):
            raise QuantizationError("NaN or infinity")
        self.amax = max(self.amax, amax)
        if amax > 0 and self.upper_edge == 0:
            self.upper_edge = amax
        while self.upper_edge < amax:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros_like(pairs)])
            self.upper_edge *= 2
        if self.upper_edge == 0:
            self.counts[0] += magnitudes.size
        else:
            bins = np.minimum((magnitudes * np.float32(BINS / self.upper_edge)).astype(np.int64), BINS - 1)
            self.counts += np.bincount(bins, minlength=BINS)

    @property
    def centres(self) -> Float64:
        """The middle of each bin."""
        return (np.arange(BINS, dtype=np.float64) + 0.5) * (self.upper_edge / BINS)


def maximum(histogram: Histogram, rounded: Rounded) -> float:
    """The largest magnitude seen: nothing is clipped."""
    return histogram.amax


def percentile(histogram: Histogram, rounded: Rounded) -> float:
    """What `PERCENTILE` percent of the magnitudes stay below."""
    shares = np.cumsum(histogram.counts) / histogram.counts.sum()
    edge = (int(np.searchsorted(shares, PERCENTILE / 100)) + 1) * histogram.upper_edge / BINS
    return min(edge, histogram.amax)


def mse(histogram: Histogram, rounded: Rounded) -> float:
    """The range with the least mean squared error of rounding and clipping."""
    centres, weights = histogram.centres, histogram.counts
    ranges = _candidates(histogram)
    errors = [float(weights @ np.square(rounded(centres, amax) - centres)) for amax in ranges]
    return ranges[int(np.argmin(errors))]


def entropy(histogram: Histogram, rounded: Rounded) -> float:
    """The range whose 8-bit values tell most of the distribution: least Kullback-Leibler divergence.

    What is clipped counts as the range's end; what is rounded to one value is spread evenly over the bins it came from
    (the method of TensorRT's int8 calibration, Migacz 2017).
    """
    ranges = _candidates(histogram)
    return ranges[int(np.argmin([_divergence(histogram, rounded, amax) for amax in ranges]))]


METHODS: dict[str, Callable[[Histogram, Rounded], float]] = {
    "max": maximum,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def choose(method: str, histogram: Histogram, rounded: Rounded) -> float:
    """The range by one of `METHODS`. Raises QuantizationError when there is nothing to choose from."""
    if histogram.amax == 0:
        raise QuantizationError("it is zero in every image, so it has no range")
    return METHODS[method](histogram, rounded)


def _candidates(histogram: Histogram) -> list[float]:
    return [float(share) * histogram.amax for share in np.linspace(LOWEST, 1.0, CANDIDATES)]


def _divergence(histogram: Histogram, rounded: Rounded, amax: float) -> float:
    inside = histogram.centres <= amax
    counts = histogram.counts[inside].astype(np.float64)
    if not counts.any():
        return float("inf")
    _, groups = np.unique(rounded(histogram.centres[inside], amax), return_inverse=True)
    filled = counts > 0
    members = np.bincount(groups, weights=filled)
    spread = np.where(filled, (np.bincount(groups, weights=counts) / np.maximum(members, 1))[groups], 0.0)
    counts[-1] += histogram.counts[~inside].sum()  # the clipped ones
    p, q = counts / counts.sum(), spread / spread.sum()
    overlap = (p > 0) & (q > 0)
    unrepresented = float(p[(p > 0) & (q == 0)].sum())  # mass where the 8-bit distribution has none
    return float((p[overlap] * np.log(p[overlap] / q[overlap])).sum()) + unrepresented * 50
