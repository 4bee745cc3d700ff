"""What Prometheus reads at /metrics: the server's own counts, and every estimator's with its model's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from densegeo.serving.models import Model
from densegeo.serving.service import Service

# Why a request was not taken on: the label of `densegeo_http_rejected_total`.
REASONS = (
    "bad_request",
    "busy",
    "deadline",
    "forbidden",
    "media_type",
    "not_found",
    "not_ready",
    "queue_full",
    "slow",
    "too_large",
    "unauthorized",
)


class ServingMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        into = {"registry": self._registry}
        self.answers = Counter("densegeo_http_requests", "Answers sent.", ["route", "status"], **into)  # type: ignore[arg-type]
        self.rejected = Counter("densegeo_http_rejected", "Requests not taken on, by reason.", ["reason"], **into)  # type: ignore[arg-type]
        self.gone = Counter("densegeo_http_gone", "Requests whose client left before the answer.", ["route"], **into)  # type: ignore[arg-type]
        self.seconds = Histogram("densegeo_http_seconds", "From a request's head to its answer.", ["route"], **into)  # type: ignore[arg-type]
        self.open = Gauge("densegeo_http_open", "Requests being read or answered.", **into)  # type: ignore[arg-type]
        for reason in REASONS:
            self.rejected.labels(reason)
        self._registry.register(_Models(service))

    def exposition(self) -> bytes:
        """All numbers in Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text

    async def whole(self) -> bytes:
        """The same of all processes of this server: here of the only one."""
        return self.exposition()


class _Models:
    """Of every loaded model the estimator's families, with a label `model`; counts start anew when it is reloaded."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        ready = GaugeMetricFamily("densegeo_ready", "1 where the model takes requests.", labels=["model"])
        up = not (self._service.draining or self._service.hung)
        for model in self._service.models.values():
            ready.add_metric([model.name], float(up and model.current is not None))
        yield ready
        yield from labelled(self._service.models)


def labelled(models: Mapping[str, Model]) -> list[Metric]:
    """One family a name, with every model's samples in it."""
    families: dict[str, Metric] = {}
    for model in models.values():
        estimator = model.current
        for family in [] if estimator is None else estimator.metrics.collector().collect():
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={**sample.labels, "model": model.name}) for sample in family.samples
            ]
    return list(families.values())
