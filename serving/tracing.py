"""A span a request, and within it one a stage, by OpenTelemetry's API where that is installed; else nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class Tracing:
    """Which SDK receives the spans is the deployment's choice; without one the API drops them."""

    def __init__(self) -> None:
        try:
            self._trace: Any = import_module("opentelemetry.trace")
            self._propagate: Any = import_module("opentelemetry.propagate")
        except ImportError:
            self._trace = None

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str], attributes: Mapping[str, Any]) -> Iterator[Any]:
        """A server's span, a child of the caller's where `traceparent` names one. Yields it, or None."""
        if self._trace is None:
            yield None
            return
        tracer = self._trace.get_tracer("densegeo.serving")
        parent = self._propagate.extract(headers)
        with tracer.start_as_current_span(
            name, context=parent, kind=self._trace.SpanKind.SERVER, attributes=attributes
        ) as span:
            yield span

    def stages(self, timings: Mapping[str, float]) -> None:
        """Spans of `Geometry.timings` (milliseconds, one after the other, ending now) below the current span."""
        if self._trace is None:
            return
        tracer = self._trace.get_tracer("densegeo.serving")
        spans = {stage: ms for stage, ms in timings.items() if stage != "total"}
        start = time.time_ns() - int(1e6 * sum(spans.values()))
        for stage, milliseconds in spans.items():
            end = start + int(1e6 * milliseconds)
            tracer.start_span(stage, start_time=start).end(end_time=end)
            start = end
