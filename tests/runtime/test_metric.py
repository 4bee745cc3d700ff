"""Calibration to metres: the right line is found, through outliers, and unusable anchors are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densegeo.errors import CalibrationError, CalibrationWarning, NotMetricError
from densegeo.outputs import DepthKind
from densegeo.runtime.anchors import MIN_SPREAD
from densegeo.runtime.geometry import Geometry

KINDS: list[DepthKind] = ["log_affine", "affine", "disparity_affine"]
LINES = {"log_affine": (2.5, -0.7), "affine": (8.0, 0.6), "disparity_affine": (1.3, 0.05)}
HEIGHT, WIDTH = 60, 80


def make(kind: DepthKind, prediction: np.ndarray | None = None) -> Geometry:
    if prediction is None:
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
        prediction = ((x / WIDTH + y / HEIGHT) / 2).astype(np.float32)  # linear: bilinear samples are exact
    height, width = prediction.shape
    return Geometry(prediction, kind, None, np.isfinite(prediction), (width, height), model="m")


def depth_of(kind: str, p: np.ndarray) -> np.ndarray:
    scale, shift = LINES[kind]
    line = scale * p.astype(np.float64) + shift
    return {"log_affine": np.exp, "affine": lambda v: v, "disparity_affine": lambda v: 1 / v}[kind](line)


def anchors_of(kind: str, count: int, seed: int = 0, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    uv = np.stack([random.uniform(0, WIDTH - 1, count), random.uniform(0, HEIGHT - 1, count)], axis=1)
    p = (uv[:, 0] / WIDTH + uv[:, 1] / HEIGHT) / 2
    return uv, depth_of(kind, p) * np.exp(noise * random.standard_normal(count))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_shift(kind: DepthKind) -> None:
    scale, shift = LINES[kind]
    result = make(kind)
    metric = result.to_metric(scale=scale, shift=shift)
    assert (result.depth_kind, metric.depth_kind) == (kind, "metric")
    assert metric.depth.dtype == np.float32
    np.testing.assert_allclose(metric.depth, depth_of(kind, result.prediction), rtol=1e-5)
    np.testing.assert_array_equal(metric.prediction, result.prediction)
    assert metric.calibration is not None
    assert metric.calibration.kind == kind
    assert math.isnan(metric.calibration.residual)


@pytest.mark.parametrize("kind", KINDS)
def test_near_and_far_are_the_extremes_of_depth(kind: DepthKind) -> None:
    result = make(kind)
    metric = result.to_metric(near=0.5, far=20.0)
    assert metric.valid.all()
    assert metric.depth.min() == pytest.approx(0.5, rel=1e-4)
    assert metric.depth.max() == pytest.approx(20.0, rel=1e-4)
    rising = -1 if kind == "disparity_affine" else 1
    order = np.argsort(rising * result.prediction.ravel())
    assert (np.diff(metric.depth.ravel()[order]) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 4, 40, 5000])
def test_exact_anchors_give_the_line(kind: DepthKind, count: int) -> None:
    metric = make(kind).to_metric(anchors=anchors_of(kind, count))
    actual = metric.calibration
    assert actual is not None
    assert (actual.scale, actual.shift) == pytest.approx(LINES[kind], rel=1e-4, abs=1e-5)
    assert (actual.inliers, actual.count) == (count, count)
    assert actual.residual < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [20, 300])
def test_a_third_of_wrong_anchors_changes_little(kind: DepthKind, count: int) -> None:
    uv, metres = anchors_of(kind, count, noise=0.01)
    wrong = count // 3
    metres[:wrong] = np.random.default_rng(3).uniform(0.2, 60, wrong)
    metric = make(kind).to_metric(anchors=(uv, metres))
    actual = metric.calibration
    assert actual is not None
    to = {"log_affine": np.log, "affine": lambda v: v, "disparity_affine": np.reciprocal}[kind]
    truth = to(depth_of(kind, metric.prediction))  # the fit is least squares in this space
    assert np.abs(to(metric.depth) - truth).max() <= 0.02 * np.ptp(truth)
    assert count / 2 <= actual.inliers <= count - wrong + 0.1 * count  # a wrong anchor may lie on the line by chance
    # plain least squares, for comparison, is far off: the outliers above are worth resisting
    p = (uv[:, 0] / WIDTH + uv[:, 1] / HEIGHT) / 2
    assert abs(np.polyfit(p, to(metres), 1)[0] / LINES[kind][0] - 1) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_a_little_wrong_are_dropped_too(kind: DepthKind) -> None:
    uv, metres = anchors_of(kind, 120, noise=0.002)
    metres[:40] *= 1.15  # within the factor of 1.25: only their spread tells them apart
    metric = make(kind).to_metric(anchors=(uv, metres))
    assert metric.calibration is not None
    assert metric.calibration.inliers <= 85
    np.testing.assert_allclose(metric.depth, depth_of(kind, metric.prediction), rtol=0.02)


def test_residual_is_the_rms_of_the_noise() -> None:
    metric = make("log_affine").to_metric(anchors=anchors_of("log_affine", 1000, noise=0.02))
    assert metric.calibration is not None
    assert metric.calibration.residual == pytest.approx(0.02, rel=0.15)


def test_the_fit_is_deterministic() -> None:
    anchors = anchors_of("log_affine", 5000, noise=0.05)
    first, second = (make("log_affine").to_metric(anchors=anchors).calibration for _ in range(2))
    assert first == second


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    scale=st.floats(0.1, 10),
    shift=st.floats(0.05, 3),
    seed=st.integers(0, 1000),
    count=st.integers(3, 60),
)
def test_any_line_is_found_from_exact_anchors(
    kind: DepthKind, scale: float, shift: float, seed: int, count: int
) -> None:
    random = np.random.default_rng(seed)
    rows, columns = random.integers(0, HEIGHT, count), random.integers(0, WIDTH, count)
    result = make(kind)
    expected = result.to_metric(scale=scale, shift=shift).depth
    anchors = (np.stack([columns, rows], 1), expected[rows, columns])
    low, high = np.percentile(result.prediction, (2, 98))
    if np.ptp(result.prediction[rows, columns]) < MIN_SPREAD * (high - low):  # a few random anchors may share a depth
        with pytest.raises(CalibrationError, match="degenerate"):
            result.to_metric(anchors=anchors)
        return
    metric = result.to_metric(anchors=anchors)
    np.testing.assert_allclose(metric.depth, expected, rtol=5e-3)


def test_pixel_centres_are_integers() -> None:
    prediction = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    result = make("affine", prediction)
    uv = [[0, 0], [3, 4], [7, 7], [2.5, 1.5]]
    actual = result.to_metric(anchors=(uv, [1.0, 4.0, 8.0, 3.5])).calibration
    assert actual is not None
    assert (actual.scale, actual.shift) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_depth_that_is_not_positive_is_invalid() -> None:
    result = make("affine")
    with pytest.warns(CalibrationWarning, match="not positive") as caught:
        metric = result.to_metric(scale=1.0, shift=-0.5)
    negative = result.prediction <= 0.5
    assert negative.any()
    np.testing.assert_array_equal(metric.valid, ~negative)
    assert np.isnan(metric.depth[negative]).all()
    assert np.isfinite(metric.depth[~negative]).all()
    assert f"{int(negative.sum())} of {HEIGHT * WIDTH} pixels" in str(caught[0].message)
    with pytest.warns(CalibrationWarning, match="beyond float32"):
        huge = make("log_affine").to_metric(scale=1000.0, shift=0.0)
    assert not huge.valid[-1, -1]
    assert np.isnan(huge.depth[-1, -1])


@pytest.mark.parametrize(
    ("kind", "scale", "shift"), [("log_affine", 1.0, 200.0), ("log_affine", 1.0, -200.0), ("affine", 1.0, -5.0)]
)
def test_a_line_that_leaves_no_depth_is_refused(kind: DepthKind, scale: float, shift: float) -> None:
    with pytest.raises(CalibrationError, match="Every pixel"):
        make(kind).to_metric(scale=scale, shift=shift)


def test_invalid_pixels_stay_invalid_and_hold_no_anchor() -> None:
    prediction = make("affine").prediction.copy()
    prediction[:10] = np.nan
    metric = make("affine", prediction).to_metric(scale=1, shift=1)
    assert not metric.valid[:10].any()
    assert metric.valid[10:].all()
    with pytest.raises(CalibrationError, match="valid pixels"):
        make("affine", prediction).to_metric(anchors=([[1, 2], [40, 5], [70, 3], [9, 30]], [1, 2, 3, 4]))


def test_depth_needs_a_calibration_and_says_how() -> None:
    with pytest.raises(NotMetricError, match="to_metric"):
        _ = make("log_affine").depth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"scale": 1.0}, "Two numbers"),
        ({"near": 1.0}, "Two numbers"),
        ({"scale": 1.0, "shift": 0.0, "near": 1.0, "far": 2.0}, "exactly one"),
        ({"scale": 1.0, "far": 2.0}, "exactly one"),
        ({"scale": 0.0, "shift": 0.0}, "positive"),
        ({"scale": -1.0, "shift": 0.0}, "positive"),
        ({"scale": math.nan, "shift": 0.0}, "finite"),
        ({"near": 2.0, "far": 1.0}, "near < far"),
        ({"near": 0.0, "far": 1.0}, "near < far"),
        ({"near": 1.0, "far": math.inf}, "near < far"),
        ({"anchors": 5}, "pair"),
    ],
)
def test_bad_parameters(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make("log_affine").to_metric(**arguments)


GOOD = anchors_of("log_affine", 12)


@pytest.mark.parametrize(
    ("uv", "metres", "message"),
    [
        (GOOD[0][:2], GOOD[1][:2], "too few"),
        (GOOD[0][:0], GOOD[1][:0], "too few"),
        (GOOD[0], GOOD[1][:5], "uv \\(N, 2\\)"),
        (GOOD[0].T, GOOD[1], "uv \\(N, 2\\)"),
        ("ab", GOOD[1], "numbers"),
        (GOOD[0], np.where(np.arange(12) == 4, np.nan, GOOD[1]), "finite"),
        (np.where(np.arange(24).reshape(12, 2) == 4, np.inf, GOOD[0]), GOOD[1], "finite"),
        (GOOD[0], np.where(np.arange(12) == 4, 0.0, GOOD[1]), "positive"),
        (GOOD[0], -GOOD[1], "positive"),
        (GOOD[0] + [WIDTH, 0], GOOD[1], "outside"),
        (GOOD[0] - [0, HEIGHT], GOOD[1], "outside"),
        (np.full((12, 2), 20.0), GOOD[1], "degenerate"),
        (np.stack([np.full(12, 20.0), 20 + np.arange(12) / 20], 1), GOOD[1], "degenerate"),
        (GOOD[0], 10 / GOOD[1], "negative scale"),
        (GOOD[0], np.random.default_rng(1).uniform(0.1, 90, 12), "negative scale"),
    ],
)
def test_anchors_that_determine_nothing(uv: object, metres: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make("log_affine").to_metric(anchors=(uv, metres))


def test_a_flat_prediction_cannot_be_calibrated() -> None:
    flat = make("log_affine", np.full((20, 30), 0.5, np.float32))
    with pytest.raises(CalibrationError, match="flat"):
        flat.to_metric(near=1, far=2)
    with pytest.raises(CalibrationError, match="flat"):
        flat.to_metric(anchors=([[1, 1], [10, 10], [20, 15]], [1, 2, 3]))
    nothing = make("log_affine", np.full((20, 30), np.nan, np.float32))
    with pytest.raises(CalibrationError, match="no valid pixels"):
        nothing.to_metric(near=1, far=2)


def test_a_metric_result_is_not_calibrated_again() -> None:
    with pytest.raises(CalibrationError, match="already"):
        make("metric").to_metric(scale=1, shift=0)
    with pytest.raises(CalibrationError, match="already"):
        make("affine").to_metric(scale=1, shift=1).to_metric(scale=1, shift=1)
