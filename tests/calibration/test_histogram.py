"""Histograms and the ranges chosen from them, against plain computations on all values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegeo.calibration.histogram import BINS, METHODS, Histogram, choose
from densegeo.errors import QuantizationError
from densegeo.models.quantized import FORMATS, quantize


def rounded(kind: str):
    dtype, largest, _ = FORMATS[kind]

    def values(given: np.ndarray, limit: float) -> np.ndarray:
        scale = torch.tensor(limit / largest)
        return (quantize(torch.from_numpy(given), scale, dtype).double() * scale).numpy()

    return values


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_bins_hold_the_magnitudes_whatever_comes_first(scales: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal(50) * scale).astype(np.float32) for scale in scales]
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    sizes = np.abs(np.concatenate(parts))
    assert histogram.amax == sizes.max()
    assert histogram.counts.sum() == sizes.size
    assert histogram.amax <= histogram.upper_edge < 2 * max(histogram.amax, np.abs(parts[0]).max()) * (1 + 1e-6)
    wide = histogram.upper_edge / BINS
    for share in (0.1, 0.5, 0.9):
        edge = (np.searchsorted(np.cumsum(histogram.counts), share * sizes.size) + 1) * wide
        exact = np.quantile(sizes, share, method="inverted_cdf")
        assert exact <= edge * (1 + 1e-5)
        assert edge <= exact + 2 * wide * (1 + 1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_mse_is_no_worse_than_any_other_range_on_the_values_themselves(kind: str) -> None:
    """A heavy tail: int8 gains from clipping it, fp8 hardly."""
    values = np.random.default_rng(0).standard_t(3, 200_000)
    histogram = Histogram()
    histogram.add(values)

    def error(limit: float) -> float:
        return float(np.square(rounded(kind)(values, limit) - values).mean())

    actual = choose("mse", histogram, rounded(kind))
    tried = {method: error(choose(method, histogram, rounded(kind))) for method in METHODS}
    assert error(actual) <= 1.02 * min(tried.values())  # bins are not values
    assert tried["mse"] < tried["max"] if kind == "int8" else tried["mse"] <= 1.02 * tried["max"]


def test_max_and_percentile_are_what_they_say() -> None:
    values = np.concatenate([np.linspace(0, 1, 99_995), np.full(5, 50.0)])
    histogram = Histogram()
    histogram.add(values)
    assert choose("max", histogram, rounded("fp8")) == 50.0
    assert choose("percentile", histogram, rounded("fp8")) == pytest.approx(1.0, abs=2 * 50 / BINS)


def test_entropy_clips_a_few_far_values() -> None:
    values = np.concatenate([np.random.default_rng(1).standard_normal(100_000), [80.0, -90.0]])
    histogram = Histogram()
    histogram.add(values)
    assert 3.0 < choose("entropy", histogram, rounded("int8")) < 45.0


def test_zeros_have_no_range_and_constants_have_one() -> None:
    zeros, ones = Histogram(), Histogram()
    zeros.add(np.zeros(10))
    ones.add(np.full(10, -3.0))
    for method in METHODS:
        with pytest.raises(QuantizationError, match="zero in every image"):
            choose(method, zeros, rounded("fp8"))
        assert 0 < choose(method, ones, rounded("int8")) <= 3.0
    zeros.add(np.full(10, 2.0))  # zeros first, then something
    assert choose("max", zeros, rounded("fp8")) == 2.0
    assert zeros.counts[0] == 10


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        Histogram().add(np.array([1.0, bad]))
    with pytest.raises(QuantizationError):
        Histogram().add(np.array([[1.0], [bad]]), every=2)  # also where it is not counted


def test_of_large_inputs_some_rows_are_counted() -> None:
    histogram, rows = Histogram(), np.random.default_rng(0).standard_normal((5000, 8)).astype(np.float32)
    rows[1, 3] = -9.0
    histogram.add(rows, every=3)
    assert histogram.amax == 9.0
    assert histogram.counts.sum() == 8 * 1667
    whole = Histogram()
    whole.add(rows)
    shares = (np.cumsum(one.counts) / one.counts.sum() for one in (histogram, whole))
    assert np.abs(np.subtract(*shares)).max() < 0.02
