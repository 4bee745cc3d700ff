"""Between the routes and the estimators: images in, geometries out, within a deadline, given up when the client leaves.

Decoding and encoding run in a few threads of their own, so that the event loop only waits.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from densegeo.errors import BackendTimeoutError, DeadlineError, NotFoundError
from densegeo.runtime import Estimator, Geometry
from densegeo.serving.models import Model

T = TypeVar("T")


class Deadline:
    """Milliseconds from a request's arrival until its turn must have come; None: no limit."""

    def __init__(self, milliseconds: float | None, arrived: float) -> None:
        self._milliseconds, self._arrived = milliseconds, arrived

    def milliseconds_left(self) -> float | None:
        """Milliseconds from now. Raises DeadlineError when there are none."""
        if self._milliseconds is None:
            return None
        milliseconds_left = self._milliseconds - 1e3 * (time.monotonic() - self._arrived)
        if milliseconds_left <= 0:
            raise DeadlineError("The deadline passed before this request could be queued; it was not run.")
        return milliseconds_left


class Service:
    """models: by name, in the order in which they were given; the first is the default.

    fixed: why models are neither loaded nor unloaded on request; empty where they are. draining: told to end. hung: a
    backend did not return in time, so this process must end; `on_hang` is called once, in any thread.
    """

    def __init__(
        self, models: Mapping[str, Model], on_hang: Callable[[], object] = lambda: None, fixed: str = ""
    ) -> None:
        self.models, self.on_hang, self.fixed = models, on_hang, fixed
        self.draining = self.hung = False
        self._pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), "densegeo-serving")

    @property
    def ready(self) -> bool:
        """Whether every model that is to take requests can: all but those that were unloaded."""
        models = self.models.values()
        return not (self.draining or self.hung) and all(model.current for model in models if model.enabled)

    def model(self, name: str | None, version: str | None = None) -> Model:
        """The model of a name, or the default. Raises NotFoundError, also for another version than the current."""
        model = next(iter(self.models.values())) if name is None else self.models.get(name)
        if model is None:
            raise NotFoundError(f"There is no model {name!r} here; there are {', '.join(self.models)}.")
        if version is not None and version != model.version:
            raise NotFoundError(f"{model.name} has no version {version!r}; it has {model.version or 'none now'}.")
        return model

    async def run(self, call: Callable[[], T]) -> T:
        """Call in one of the threads, in this context: what is warned of there is the request's."""
        return await asyncio.wrap_future(self._pool.submit(copy_context().run, call))

    async def estimate(self, estimator: Estimator, images: Sequence[object], deadline: Deadline) -> list[Geometry]:
        """One geometry an image. When one fails, or this is cancelled, those that still wait are not run.

        estimator: leased of its model. Raises what `Estimator.submit` and its futures raise.
        """
        submit = partial(self._submit, estimator, images, deadline)
        submission = self._pool.submit(copy_context().run, submit)
        try:
            futures = await asyncio.wrap_future(submission)
        except asyncio.CancelledError:
            submission.add_done_callback(_cancel_submitted)  # it may be running, and cannot be stopped
            raise
        try:
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Finish what was accepted and release all bundles. Waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for model in self.models.values():
            model.close()

    def _submit(self, estimator: Estimator, images: Sequence[object], deadline: Deadline) -> list[Future[Geometry]]:
        futures: list[Future[Geometry]] = []
        try:
            for image in images:
                futures.append(self._submit_one(estimator, image, deadline))
        except BaseException as error:
            for future in futures:
                future.cancel()
            self._notice(error)
            raise
        return futures

    def _submit_one(self, estimator: Estimator, image: object, deadline: Deadline) -> Future[Geometry]:
        future = estimator.submit(image, deadline_ms=deadline.milliseconds_left())
        future.add_done_callback(self._look_at)
        return future

    def _look_at(self, future: Future[Geometry]) -> None:
        if not future.cancelled():
            self._notice(future.exception())

    def _notice(self, error: BaseException | None) -> None:
        if isinstance(error, BackendTimeoutError) and not self.hung:
            self.hung = True
            self.on_hang()


def _cancel_submitted(submission: Future[list[Future[Geometry]]]) -> None:
    if not submission.cancelled() and submission.exception() is None:
        for future in submission.result():
            future.cancel()
