"""Depth and normal scores: alignment per image as FE2E's released evaluation does it, angles pooled as DSINE does.

Depth scores follow Marigold's evaluation (github.com/prs-eth/Marigold), as FE2E does (github.com/AMAP-ML/FE2E, infer/):
each image is scored over its valid pixels, and a dataset's score is the mean over its images. Normal scores follow
DSINE's (github.com/baegwangbin/DSINE), as FE2E does too: the angles of all valid pixels of a dataset are pooled, so
that an image counts by its pixels. (Marigold's own evaluation of normals averages over images instead.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.outputs import DepthKind

Array = NDArray[Any]
Float64 = NDArray[np.float64]

SMALLEST = 1e-6  # metres: aligned depths are at least this, whatever the dataset's range
FLAT = 1e-12  # relative range below which a prediction counts as constant
ANGLE_BIN = 1e-3  # degrees
_BINS = round(180 / ANGLE_BIN)


@dataclass(frozen=True)
class Alignment:
    """How a kind of prediction is fitted to the truth: `back(clip(s * p + t, low, high))` is in metres.

    to: metres -> the space in which s and t are fitted; back: its inverse. positive: only pixels with p > 0 are fitted.
    """

    to: Callable[[Any], Any]
    back: Callable[[Any], Any]
    positive: bool
    low: float = -np.inf
    high: float = np.inf


# log_affine: FE2E's "log_space". The others: Marigold's "least_square", "least_square_disparity", and no fit.
ALIGNMENTS: Mapping[DepthKind, Alignment | None] = {
    "log_affine": Alignment(np.log, np.exp, positive=True, high=5.0),
    "affine": Alignment(lambda x: x, lambda x: x, positive=False),
    "disparity_affine": Alignment(np.reciprocal, np.reciprocal, positive=True, low=1e-3),
    "metric": None,
}


@dataclass(frozen=True)
class DepthScores:
    """Of one image, or their means over images. abs_rel, rmse_log and deltas (shares in [0, 1]) have no unit."""

    abs_rel: float
    sq_rel: float  # metres
    rmse: float  # metres
    rmse_log: float
    delta1: float  # ratio, either way round, below 1.25
    delta2: float  # 1.25^2
    delta3: float  # 1.25^3


@dataclass(frozen=True)
class NormalScores:
    """Of all pixels of a dataset: angles in degrees, shares in percent of pixels with a smaller angle."""

    pixels: int
    mean: float
    median: float
    rmse: float
    below_5: float
    below_7_5: float
    below_11_25: float
    below_22_5: float
    below_30: float


THRESHOLDS = (5.0, 7.5, 11.25, 22.5, 30.0)  # degrees, in the order of NormalScores


def fit_line(p: Float64, y: Float64) -> tuple[float, float]:
    """(s, t) of least squares y = s * p + t over (N,), N >= 1; a constant p has s = 0, and only t is fitted."""
    middle, target = p.mean(), y.mean()
    if np.ptp(p) <= FLAT * np.abs(p).max():
        return 0.0, float(target)
    centred = p - middle
    scale = float(centred @ (y - target) / (centred @ centred))
    return scale, float(target - scale * middle)


def align(
    prediction: Array, truth: Array, mask: NDArray[np.bool_], kind: DepthKind, depth_range: tuple[float, float]
) -> Float64:
    """Depths in metres (N,) of the N >= 1 pixels in `mask`, fitted to the truth there and clipped to `depth_range`.

    prediction, truth: (H, W); truth is positive and finite in mask. Pixels with p <= 0 take no part in a fit that wants
    positive ones, and are scored all the same; where no pixel is left to fit, only t is fitted, to all of them.
    """
    p, metres = prediction[mask].astype(np.float64), truth[mask].astype(np.float64)
    alignment = ALIGNMENTS[kind]
    if alignment is not None:
        targets = alignment.to(metres)
        fitted = p > 0 if alignment.positive else np.ones(p.shape, dtype=bool)
        scale, shift = fit_line(p[fitted], targets[fitted]) if fitted.any() else (0.0, float(targets.mean()))
        p = np.asarray(alignment.back(np.clip(scale * p + shift, alignment.low, alignment.high)))
    return np.maximum(np.clip(p, *depth_range), SMALLEST)


def depth_scores(predicted: Float64, truth: Float64) -> DepthScores:
    """Scores of one image from positive metres (N,), N >= 1."""
    error = predicted - truth
    log_error = np.log(predicted) - np.log(truth)
    ratio = np.maximum(predicted / truth, truth / predicted)
    return DepthScores(
        abs_rel=float(np.mean(np.abs(error) / truth)),
        sq_rel=float(np.mean(error**2 / truth)),
        rmse=float(np.sqrt(np.mean(error**2))),
        rmse_log=float(np.sqrt(np.mean(log_error**2))),
        delta1=float(np.mean(ratio < 1.25)),
        delta2=float(np.mean(ratio < 1.25**2)),
        delta3=float(np.mean(ratio < 1.25**3)),
    )


def mean_scores(images: list[DepthScores]) -> DepthScores | None:
    """Every image counts the same; None for no images."""
    return DepthScores(*np.mean([astuple(scores) for scores in images], axis=0).tolist()) if images else None


def angles(predicted: Array, truth: Array) -> Float64:
    """Degrees (N,) between vectors (N, 3) of any length; a zero vector is 90 degrees from everything."""
    a, b = predicted.astype(np.float64), truth.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / np.maximum(lengths, 1e-12)
    degrees: Float64 = np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))
    return degrees


class AnglePool:
    """Angles of any number of pixels in fixed memory (1.4 MB).

    Mean, RMSE and shares are exact. The median comes from a histogram, off by at most half an `ANGLE_BIN`: 0.0005 deg.
    """

    def __init__(self) -> None:
        self._histogram = np.zeros(_BINS, dtype=np.int64)
        self._sum = self._squares = 0.0
        self._below = np.zeros(len(THRESHOLDS), dtype=np.int64)
        self.pixels = 0

    def add(self, degrees: Float64) -> None:
        """More angles (N,) in [0, 180]; NaN makes every score NaN."""
        self.pixels += degrees.size
        self._sum += float(degrees.sum())
        self._squares += float(degrees @ degrees)
        self._below += [np.count_nonzero(degrees < threshold) for threshold in THRESHOLDS]
        if np.isfinite(self._sum):
            bins = np.minimum((degrees / ANGLE_BIN).astype(np.int64), _BINS - 1)
            self._histogram += np.bincount(bins, minlength=_BINS)

    def scores(self) -> NormalScores | None:
        """None when no pixel was added."""
        if self.pixels == 0:
            return None
        if not np.isfinite(self._sum):
            return NormalScores(self.pixels, *[float("nan")] * (3 + len(THRESHOLDS)))
        ranks = np.array([(self.pixels - 1) // 2, self.pixels // 2])  # the two middle ones, or the middle one twice
        middle = np.searchsorted(np.cumsum(self._histogram), ranks, side="right")
        return NormalScores(
            self.pixels,
            self._sum / self.pixels,
            float((middle.mean() + 0.5) * ANGLE_BIN),
            float(np.sqrt(self._squares / self.pixels)),
            *(100.0 * self._below / self.pixels).tolist(),
        )
