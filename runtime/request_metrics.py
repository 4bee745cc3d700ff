"""What the runtime counts: how requests ended, and histograms of where their time went.

Counting needs the standard library only. `exposition` and `collector` hand the same numbers to Prometheus.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from densegeo.errors import ConfigError
from densegeo.extras import install_hint

# accepted = completed + failed + expired + cancelled + those still waiting or running.
COUNTERS: Mapping[str, str] = {
    "accepted": "Requests taken on: direct calls and submitted images.",
    "completed": "Accepted requests that ended with a result.",
    "failed": "Accepted requests that ended with an error, deadlines apart.",
    "expired": "Accepted requests whose deadline passed before they were run.",
    "cancelled": "Accepted requests that were cancelled before they were run.",
    "rejected": "Requests not taken on: full queue, closed estimator, unusable image.",
    "dropped": "Camera frames replaced by newer ones, or left over when their stream was closed.",
}
# histogram -> spans of `Geometry.timings` that it sums up; together they are the whole of "end_to_end".
STAGES: Mapping[str, tuple[str, ...]] = {
    "preprocess": ("load", "prepare"),
    "queue": ("queue",),
    "encode": ("encoder",),
    "denoiser": ("denoiser",),
    "decode": ("decoder",),
    "device": ("device",),  # copies, resizing and networks, for a backend that takes whole images
    "postprocess": ("split", "finish"),
    "end_to_end": ("total",),
}
BOUNDS = tuple(factor * 10.0**power for power in range(-4, 2) for factor in (1.0, 2.5, 5.0))  # seconds: 0.1 ms to 50 s


class StageTimings:
    """Contiguous spans of one request in milliseconds: each ends where the next begins, so they sum to the total."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self.milliseconds: dict[str, float] = {}

    def end_stage(self, name: str) -> None:
        """End a span here; spans of one name are added up."""
        now = self._clock()
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + 1e3 * (now - self._last)
        self._last = now

    @property
    def total(self) -> float:
        """Milliseconds of all spans so far."""
        return sum(self.milliseconds.values())


@dataclass(frozen=True)
class Histogram:
    """counts: observations per bucket, the last one above every bound of `BOUNDS`; sum: seconds of all of them."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    sum: float = 0.0

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound in seconds, observations up to it), the last bound infinite."""
        total, pairs = 0, []
        for bound, count in zip((*BOUNDS, float("inf")), self.counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs


@dataclass(frozen=True)
class Snapshot:
    """All numbers at one moment. counters: by the names of `COUNTERS`; histograms: seconds, by those of `STAGES`;
    together: how many groups of n queued images were run at once, by n.
    """

    counters: Mapping[str, int]
    histograms: Mapping[str, Histogram]
    together: Mapping[int, int]


class Metrics:
    """Counters and histograms of one estimator; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._counts = {stage: [0] * (len(BOUNDS) + 1) for stage in STAGES}
        self._sums = dict.fromkeys(STAGES, 0.0)
        self._together: dict[int, int] = {}

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of `COUNTERS`."""
        with self._lock:
            self._counters[name] += by

    def count_group(self, images: int) -> None:
        """Count a group of queued images that are run at once."""
        with self._lock:
            self._together[images] = self._together.get(images, 0) + 1

    def observe(self, timings: Mapping[str, float]) -> None:
        """Add one request's spans (milliseconds, as in `Geometry.timings`); stages it did not pass are left out."""
        with self._lock:
            for stage, spans in STAGES.items():
                present = [timings[span] for span in spans if span in timings]
                if present:
                    seconds = sum(present) / 1e3
                    self._counts[stage][bisect_left(BOUNDS, seconds)] += 1
                    self._sums[stage] += seconds

    def snapshot(self) -> Snapshot:
        """A consistent copy."""
        with self._lock:
            histograms = {stage: Histogram(tuple(self._counts[stage]), self._sums[stage]) for stage in STAGES}
            return Snapshot(dict(self._counters), histograms, dict(self._together))

    def exposition(self) -> str:
        """The numbers in Prometheus' text format. Raises ConfigError when prometheus-client is not installed."""
        library = _prometheus()
        registry = library.CollectorRegistry()
        registry.register(self.collector())
        text: bytes = library.generate_latest(registry)
        return text.decode()

    def collector(self) -> Collector:
        """For `prometheus_client.REGISTRY.register`. Raises ConfigError when prometheus-client is not installed."""
        return Collector(self, _prometheus())


class Collector:
    """Reads `Metrics` whenever Prometheus asks, so nothing is counted a second time. library: prometheus_client."""

    def __init__(self, metrics: Metrics, library: Any) -> None:
        self._metrics, self._core = metrics, library.core

    def collect(self) -> Iterator[Any]:
        """One metric family after the other."""
        snapshot = self._metrics.snapshot()
        for name, text in COUNTERS.items():
            noun = "frames" if name == "dropped" else "requests"
            yield self._core.CounterMetricFamily(f"densegeo_{noun}_{name}", text, value=snapshot.counters[name])
        stages = [stage for stage in STAGES if stage != "end_to_end"]
        family = self._core.HistogramMetricFamily
        each = family("densegeo_stage_seconds", "Time of a request in each stage.", labels=["stage"])
        for stage in stages:
            each.add_metric([stage], **_samples(snapshot.histograms[stage]))
        yield each
        whole = family("densegeo_request_seconds", "Time of a request, end to end.")
        whole.add_metric([], **_samples(snapshot.histograms["end_to_end"]))
        yield whole
        groups = self._core.CounterMetricFamily(
            "densegeo_groups", "Groups of queued images that were run at once, by their size.", labels=["images"]
        )
        for images, count in sorted(snapshot.together.items()):
            groups.add_metric([str(images)], count)
        yield groups


def _samples(histogram: Histogram) -> dict[str, Any]:
    buckets = [("+Inf" if bound == float("inf") else f"{bound:g}", count) for bound, count in histogram.cumulative()]
    return {"buckets": buckets, "sum_value": histogram.sum}


def _prometheus() -> Any:
    try:
        import prometheus_client.core
    except ImportError:
        raise ConfigError(f"Prometheus' format needs prometheus-client: {install_hint('metrics')}.") from None
    return prometheus_client
