"""The service over a runner: a queue for requests, streams for cameras. Its threads start with the first request."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from weakref import WeakSet

from densegeo.colors import Color, color_row
from densegeo.errors import ShutdownError
from densegeo.runtime.batcher import Batcher, BatchOptions
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.levels import Range, check_range
from densegeo.runtime.runner import Runner
from densegeo.runtime.stream import Stream
from densegeo.runtime.ways import Job


class Service:
    """Images are read and fitted in the submitter's thread, and run in the batcher's."""

    def __init__(self, runner: Runner, options: BatchOptions, require: Callable[[], None]) -> None:
        """require: raises what keeps every request from being taken on."""
        self._runner, self._options, self._require = runner, options, require
        self._lock = threading.Lock()  # guards what follows
        self._batcher: Batcher[Job, Geometry] | None = None
        self._streams: WeakSet[Stream] = WeakSet()
        self._closed = False

    @property
    def max_queue(self) -> int:
        """How many requests may wait."""
        return self._options.max_queue

    def submit(
        self,
        image: object,
        color: Color,
        value_range: Range | None = None,
        deadline_ms: float = math.inf,
        *,
        wait: bool = False,
    ) -> Future[Geometry]:
        """Queue one image. wait: for room in the queue, instead of raising. See `Estimator.submit`."""
        self._require()
        with self._lock:
            self._require_open()
            if self._batcher is None:
                self._batcher = Batcher(self._run, self._options, self._runner.metrics)
            batcher = self._batcher
        batcher.admit(wait)
        job = self._runner.prepare(image, color, value_range, keep=True)
        return batcher.submit(job, job.key, (deadline_ms - job.timings.total) / 1e3, wait)

    def stream(self, latest: bool, color: Color, depth: int, value_range: Range | None = None) -> Stream:
        """See `Estimator.stream`."""
        self._require()
        color_row(color)
        check_range(value_range)
        with self._lock:
            self._require_open()
            stream = Stream(
                lambda image: self.submit(image, color, value_range, wait=True),
                self._runner.metrics,
                latest=latest,
                depth=depth,
            )
            self._streams.add(stream)
        return stream

    def close(self, drain: bool) -> bool:
        """End all streams and requests; whether nothing uses the backend any more."""
        with self._lock:
            self._closed = True
            batcher, streams = self._batcher, list(self._streams)
        for stream in streams:
            stream.close()
        return batcher is None or batcher.close(drain)

    def _run(self, jobs: list[Job]) -> list[Geometry]:
        for job in jobs:
            job.timings.end_stage("queue")
        return self._runner.run(jobs)

    def _require_open(self) -> None:
        if self._closed:
            raise ShutdownError("This estimator is closed. Make a new Estimator.")
