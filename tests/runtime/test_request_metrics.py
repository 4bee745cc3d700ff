"""Counters and histograms, and their way to Prometheus; spans that sum to the total."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from densegeo.errors import BackendError, ConfigError, ImageError
from densegeo.runtime import Estimator
from densegeo.runtime.request_metrics import BOUNDS, COUNTERS, STAGES, Histogram, Metrics, StageTimings


def test_laps_are_contiguous_and_add_up() -> None:
    times = iter([10.0, 10.5, 12.0, 12.25])
    timings = StageTimings(lambda: next(times))
    for name in ("a", "b", "a"):
        timings.end_stage(name)
    assert timings.milliseconds == {"a": 750.0, "b": 1500.0}
    assert timings.total == 2250.0


def test_observations_fall_into_their_buckets() -> None:
    metrics = Metrics()
    metrics.observe({"load": 0.06, "prepare": 0.04, "encoder": 0.2, "total": 1e6})
    metrics.observe({"queue": 1.0})
    snapshot = metrics.snapshot()
    histograms = snapshot.histograms
    assert {stage: histograms[stage].count for stage in STAGES} == {
        "preprocess": 1, "queue": 1, "encode": 1, "denoiser": 0, "decode": 0, "device": 0, "postprocess": 0,
        "end_to_end": 1,
    }  # fmt: skip
    assert histograms["preprocess"].counts[0] == 1  # 0.1 ms lies on the first bound, which includes it
    assert histograms["encode"].counts[1] == 1
    assert histograms["end_to_end"].counts[-1] == 1  # above every bound
    assert histograms["queue"].sum == pytest.approx(1e-3)
    metrics.observe({"queue": 1.0})
    assert histograms["queue"].count == 1, "a snapshot changed"


def test_cumulative_counts() -> None:
    histogram = Histogram((1, 0, 2, *[0] * (len(BOUNDS) - 3), 4), sum=1.0)
    pairs = histogram.cumulative()
    assert pairs[:3] == [(BOUNDS[0], 1), (BOUNDS[1], 1), (BOUNDS[2], 3)]
    assert pairs[-2:] == [(BOUNDS[-1], 3), (float("inf"), 7)]
    assert list(BOUNDS) == sorted(BOUNDS)


def test_threads_lose_no_count(run_in_threads: Callable[..., list[object]]) -> None:
    metrics = Metrics()

    def work(_: int) -> None:
        for _ in range(500):
            metrics.count("accepted")
            metrics.observe({"queue": 2.0})

    run_in_threads(work, 4)
    snapshot = metrics.snapshot()
    assert snapshot.counters["accepted"] == 2000
    assert snapshot.histograms["queue"].count == 2000
    assert snapshot.histograms["queue"].sum == pytest.approx(4.0)


def test_an_estimator_counts_direct_calls(bundle: Path, picture: np.ndarray) -> None:
    with Estimator(bundle, device="cpu") as estimator:
        spans = [estimator(picture).timings for _ in range(3)]
        with pytest.raises(ImageError):
            estimator("nowhere.png")
    with pytest.raises(BackendError):
        estimator(picture)
    snapshot = estimator.metrics.snapshot()
    expected = dict.fromkeys(COUNTERS, 0) | {"accepted": 4, "completed": 3, "failed": 1, "rejected": 1}
    assert snapshot.counters == expected
    histograms = snapshot.histograms
    assert {stage: histogram.count for stage, histogram in histograms.items()} == {
        **dict.fromkeys(STAGES, 3),
        "queue": 0,
        "device": 0,
    }
    assert histograms["end_to_end"].sum == pytest.approx(sum(span["total"] for span in spans) / 1e3)
    parts = sum(histogram.sum for stage, histogram in histograms.items() if stage != "end_to_end")
    assert parts == pytest.approx(histograms["end_to_end"].sum)


@pytest.mark.parametrize("decoder_batch", [1, 2])
def test_overhead_is_itemised(
    new_bundle: Callable[..., Path], picture: np.ndarray, decoder_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend's three stages have spans of their own, and so does all that runs between them."""
    seconds = count()  # a clock on which every span takes one second
    monkeypatch.setattr("densegeo.runtime.runner.StageTimings", partial(StageTimings, lambda: float(next(seconds))))
    with Estimator(new_bundle(decoder_batch=decoder_batch), device="cpu") as estimator:
        spans = dict(estimator(picture).timings)
        queued = dict(estimator.submit(picture).result(30).timings)
    each = {"load": 1e3, "prepare": 1e3, "encoder": 1e3, "denoiser": 1e3, "split": 1e3}
    each |= {"decoder": 1e3 * (3 - decoder_batch), "finish": 1e3}
    assert spans.pop("total") == sum(spans.values())
    assert spans == each
    assert queued.pop("total") == sum(queued.values())
    assert queued == {**each, "queue": 1e3}


def test_spans_sum_to_the_wall_time(bundle: Path, picture: np.ndarray) -> None:
    """On a real clock, what lies outside the spans (making the result) is small beside the call."""
    large = np.tile(picture, (8, 8, 1))
    share = 0.0
    with Estimator(bundle, device="cpu") as estimator:
        for _ in range(50):
            start = time.perf_counter()
            spans = dict(estimator(large).timings)
            wall = 1e3 * (time.perf_counter() - start)
            assert spans.pop("total") == pytest.approx(sum(spans.values()))
            share = sum(spans.values()) / wall
            if share >= 0.99:  # one of several: a busy machine may interrupt between two readings
                break
    assert 0.99 <= share <= 1


def test_exposition(bundle: Path, picture: np.ndarray) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    with Estimator(bundle, device="cpu") as estimator:
        for future in [estimator.submit(picture) for _ in range(3)]:
            future.result(30)
        estimator(picture)
        text = estimator.metrics.exposition()
        assert text == estimator.metrics.exposition(), "reading changed the numbers"
        snapshot = estimator.metrics.snapshot()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    for name, value in snapshot.counters.items():
        assert samples[f"densegeo_{'frames' if name == 'dropped' else 'requests'}_{name}_total",] == value
    assert samples["densegeo_requests_completed_total",] == 4
    for stage in set(STAGES) - {"end_to_end"}:
        number = {"queue": 3, "device": 0}.get(stage, 4)
        assert samples["densegeo_stage_seconds_count", stage] == number
        assert samples["densegeo_stage_seconds_bucket", "+Inf", stage] == number
        assert samples["densegeo_stage_seconds_sum", stage] == pytest.approx(snapshot.histograms[stage].sum)
    assert samples["densegeo_request_seconds_count",] == 4
    assert {families[name].type for name in ("densegeo_stage_seconds", "densegeo_request_seconds")} == {"histogram"}


def test_a_registry_reads_the_same_numbers() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    metrics, registry = Metrics(), prometheus.CollectorRegistry()
    registry.register(metrics.collector())
    metrics.count("dropped", 5)
    assert registry.get_sample_value("densegeo_frames_dropped_total") == 5
    metrics.count("dropped")
    assert registry.get_sample_value("densegeo_frames_dropped_total") == 6


def test_without_prometheus_everything_but_its_format_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prometheus_client", "prometheus_client.core"):
        monkeypatch.setitem(sys.modules, name, None)  # None makes the import fail
    metrics = Metrics()
    metrics.count("accepted")
    assert metrics.snapshot().counters["accepted"] == 1
    for export in (metrics.exposition, metrics.collector):
        with pytest.raises(ConfigError, match=r"\.\[metrics\]"):
            export()
