"""Scores against a second implementation in plain Python, and cases worked out by hand."""

from __future__ import annotations

import math
import statistics
from dataclasses import astuple

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression

from densegeo.benchmarks.scores import (
    ANGLE_BIN,
    SMALLEST,
    AnglePool,
    align,
    angles,
    depth_scores,
    fit_line,
    mean_scores,
)
from densegeo.outputs import DepthKind
from tests.support.datasets import slow_angle

WIDE = (1e-5, math.inf)
KINDS: tuple[DepthKind, ...] = ("log_affine", "affine", "disparity_affine", "metric")


def expected_depths(p: list[float], z: list[float], kind: DepthKind, low: float, high: float) -> list[float]:
    """The protocol pixel by pixel; the line is scikit-learn's."""
    forward = {"log_affine": math.log, "affine": float, "disparity_affine": lambda x: 1 / x}
    line = list(p)
    if kind != "metric":
        fitted = [i for i in range(len(p)) if p[i] > 0 or kind == "affine"]
        model = LinearRegression().fit([[p[i]] for i in fitted], [forward[kind](z[i]) for i in fitted])
        line = [float(model.coef_[0]) * value + float(model.intercept_) for value in p]
    if kind == "log_affine":
        line = [math.exp(min(value, 5.0)) for value in line]
    if kind == "disparity_affine":
        line = [1 / max(value, 1e-3) for value in line]
    return [max(min(max(value, low), high), 1e-6) for value in line]


def expected_scores(d: list[float], z: list[float]) -> list[float]:
    n = len(d)
    worst = [max(a / b, b / a) for a, b in zip(d, z, strict=True)]
    return [
        sum(abs(a - b) / b for a, b in zip(d, z, strict=True)) / n,
        sum((a - b) ** 2 / b for a, b in zip(d, z, strict=True)) / n,
        math.sqrt(sum((a - b) ** 2 for a, b in zip(d, z, strict=True)) / n),
        math.sqrt(sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(d, z, strict=True)) / n),
        *(sum(ratio < 1.25**power for ratio in worst) / n for power in (1, 2, 3)),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_depth_equals_a_second_implementation(kind: DepthKind, seed: int) -> None:
    rng = np.random.default_rng([seed, len(kind)])
    shape = (int(rng.integers(2, 20)), int(rng.integers(2, 20)))
    truth = np.exp(rng.uniform(-2, 5, shape)).astype(np.float32)
    prediction = rng.uniform(-0.2, 1, shape).astype(np.float32)  # some p <= 0: scored, and not fitted where logs are
    mask = rng.random(shape) < 0.7
    mask[0, :2] = True
    depth_range = (0.3, 40.0)
    actual = align(prediction, truth, mask, kind, depth_range)
    p, z = prediction[mask].tolist(), truth[mask].tolist()
    expected = expected_depths(p, z, kind, *depth_range)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    scores = depth_scores(actual, truth[mask].astype(np.float64))
    np.testing.assert_allclose(astuple(scores), expected_scores(expected, z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_normals_equal_a_second_implementation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches: list[list[float]] = []
    pool = AnglePool()
    for _ in range(3):
        truth = rng.standard_normal((int(rng.integers(1, 400)), 3)).astype(np.float32)
        predicted = (truth + rng.exponential(0.3) * rng.standard_normal(truth.shape)).astype(np.float32)
        pool.add(angles(predicted, truth))
        batches.append([slow_angle(a, b) for a, b in zip(predicted.tolist(), truth.tolist(), strict=True)])
    every = [angle for batch in batches for angle in batch]
    scores = pool.scores()
    assert scores is not None
    assert scores.pixels == len(every)
    assert scores.mean == pytest.approx(statistics.fmean(every), rel=1e-6)
    assert scores.median == pytest.approx(statistics.median(every), abs=ANGLE_BIN / 2 + 1e-6)
    assert scores.rmse == pytest.approx(math.sqrt(statistics.fmean(a * a for a in every)), rel=1e-6)
    shares = [100 * sum(a < limit for a in every) / len(every) for limit in (5, 7.5, 11.25, 22.5, 30)]
    assert list(astuple(scores)[4:]) == pytest.approx(shares)


def row(*values: float) -> NDArray[np.float32]:
    return np.array([values], dtype=np.float32)


def test_depth_by_hand() -> None:
    # |1 - 2| / 2 and |4 - 2| / 2; ratios 2 and 2, beyond 1.25^3 = 1.953
    scores = depth_scores(np.array([1.0, 4.0]), np.array([2.0, 2.0]))
    assert astuple(scores) == pytest.approx((0.75, 1.25, math.sqrt(2.5), math.log(2), 0, 0, 0))
    # a ratio of exactly 1.25 is not below it; 1.5 is below 1.25^2 = 1.5625; 1.9 below 1.25^3
    scores = depth_scores(np.array([1.25, 1.5, 1.9, 1.0]), np.ones(4))
    assert (scores.delta1, scores.delta2, scores.delta3) == (0.25, 0.75, 1.0)


def test_a_perfect_line_is_found_whatever_its_slope() -> None:
    p = np.linspace(0.1, 1, 12, dtype=np.float32).reshape(3, 4)
    everywhere = np.ones(p.shape, dtype=bool)
    for scale in (2.0, -2.0):
        truth = np.exp(scale * p + 0.5)
        np.testing.assert_allclose(align(p, truth, everywhere, "log_affine", WIDE), truth.ravel(), rtol=1e-6)


def test_pixels_without_positive_prediction_are_scored_but_not_fitted() -> None:
    # The two fitted pixels give ln z = p, so p = 0 means 1 m and p = -1 means 1/e m.
    p, truth = row(1, 2, 0, -1), row(math.e, math.e**2, 50, 50)
    actual = align(p, truth, np.ones((1, 4), dtype=bool), "log_affine", WIDE)
    np.testing.assert_allclose(actual, [math.e, math.e**2, 1, 1 / math.e], rtol=1e-6)


def test_the_clip_at_five_and_the_range() -> None:
    p, truth = row(1, 2, 3), np.exp(row(2, 4, 6))
    everywhere = np.ones((1, 3), dtype=bool)
    actual = align(p, truth, everywhere, "log_affine", (10.0, math.inf))
    np.testing.assert_allclose(actual, [10, math.exp(4), math.exp(5)], rtol=1e-5)
    assert align(p, truth, everywhere, "log_affine", (1e-3, 80.0))[2] == 80
    assert align(row(-1), row(2), np.ones((1, 1), dtype=bool), "metric", (0.0, 80.0))[0] == SMALLEST


@pytest.mark.parametrize("p", [0.4, 0.0, -0.3])
def test_a_constant_prediction_is_fitted_by_its_shift_alone(p: float) -> None:
    truth = row(1, 4, 16)
    actual = align(np.full((1, 3), p, dtype=np.float32), truth, np.ones((1, 3), dtype=bool), "log_affine", WIDE)
    np.testing.assert_allclose(actual, 4, rtol=1e-6)  # the geometric mean
    actual = align(np.full((1, 3), p, dtype=np.float32), truth, np.ones((1, 3), dtype=bool), "affine", WIDE)
    np.testing.assert_allclose(actual, 7, rtol=1e-6)


def test_a_single_pixel_is_hit() -> None:
    mask = np.zeros((1, 3), dtype=bool)
    mask[0, 1] = True
    assert align(row(0.1, 0.2, 0.3), row(1, 7, 3), mask, "log_affine", WIDE) == pytest.approx([7])
    assert fit_line(np.array([0.2]), np.array([3.0])) == (0.0, 3.0)


def test_no_images_and_no_pixels_have_no_scores() -> None:
    assert mean_scores([]) is None
    pool = AnglePool()
    pool.add(angles(np.zeros((0, 3)), np.zeros((0, 3))))
    assert pool.scores() is None


def test_images_count_the_same_whatever_their_size() -> None:
    small = depth_scores(np.array([2.0]), np.array([1.0]))
    large = depth_scores(np.ones(99), np.ones(99))
    mean = mean_scores([small, large])
    assert mean is not None
    assert mean.abs_rel == 0.5
    assert mean.delta1 == 0.5


def test_angles_by_hand() -> None:
    a = np.array([[0, 0, -1], [0, 0, -2], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=np.float32)
    b = np.array([[0, 0, -1], [0, -1, 0], [-1, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=np.float32)
    np.testing.assert_allclose(angles(a, b), [0, 90, 180, 90, 45], atol=1e-6)


def test_pooled_angles_by_hand() -> None:
    pool = AnglePool()
    pool.add(np.array([0.0, 5.0, 180.0]))
    pool.add(np.array([29.0]))
    scores = pool.scores()
    assert scores is not None
    assert scores.mean == 53.5
    assert scores.median == pytest.approx(17, abs=ANGLE_BIN)  # between 5 and 29
    assert astuple(scores)[4:] == (25, 50, 50, 50, 75)  # 5 is not below 5


def test_a_nan_is_not_hidden() -> None:
    p, truth = row(0.2, math.nan, 0.7), row(1, 2, 3)
    aligned = align(p, truth, np.ones((1, 3), dtype=bool), "log_affine", WIDE)
    assert math.isnan(depth_scores(aligned, truth.ravel().astype(np.float64)).abs_rel)
    pool = AnglePool()
    pool.add(np.array([1.0, math.nan]))
    scores = pool.scores()
    assert scores is not None
    assert math.isnan(scores.mean)
    assert math.isnan(scores.below_5)
