"""The micro-batcher behind `Estimator.submit`: one queue, worker threads, one future a request.

A worker runs one group of requests at a time. One worker is enough where the backend computes on the host; on a device
a second one copies and launches while the first waits, so that the copies of one image overlap the networks of
another.

Every accepted request ends exactly once: its result, a typed error, or its cancellation. A request belongs to the
queue, then to the batch being run; whoever takes it out of there, under the one lock, is the only one to end it.

A Python thread cannot be killed. When the backend does not return within `timeout_s`, a watchdog thread ends all
requests with `BackendTimeoutError` and refuses new ones; stuck workers are left alone (they are daemon threads, so they
do not keep the process alive) and what they may still return is thrown away.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar, cast
from weakref import WeakSet

from densegeo.argument_checks import number_of, shown, whole_of
from densegeo.errors import BackendError, BackendTimeoutError, ConfigError, DeadlineError, DensegeoError, ShutdownError
from densegeo.runtime.queueing import BoundedQueue, Entry
from densegeo.runtime.request_metrics import Metrics

T = TypeVar("T")
R = TypeVar("R")

EXIT_WAIT_S = 5.0  # how long an interpreter's exit waits for a request that is being run


@dataclass(frozen=True)
class BatchOptions:
    """max_batch: requests a batch; max_wait_ms: how long the oldest waits for others; max_queue: requests that may
    wait; timeout_s: longest time the backend may take for one group, None for no limit; workers: threads;
    together: how many of a batch's requests make a group, which the backend runs at once. Raises ConfigError.
    """

    max_batch: int = 8
    max_wait_ms: float = 0.0
    max_queue: int = 64
    timeout_s: float | None = None
    workers: int = 1
    together: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "workers", "together"):
            object.__setattr__(self, name, whole_of(name, getattr(self, name)))
        wait = number_of(self.max_wait_ms)
        if wait is None or not 0 <= wait < math.inf:
            raise ConfigError(f"max_wait_ms must be 0 or more milliseconds, not {shown(self.max_wait_ms)}.")
        object.__setattr__(self, "max_wait_ms", wait)
        if self.timeout_s is not None:
            limit = number_of(self.timeout_s)
            if limit is None or not 0 < limit <= threading.TIMEOUT_MAX:
                raise ConfigError(
                    f"timeout_s must be seconds above 0, or None for no limit, not {shown(self.timeout_s)}."
                )
            object.__setattr__(self, "timeout_s", limit)


@dataclass(frozen=True, eq=False)
class Request(Generic[T, R]):
    """What a caller handed in, and the future that ends it."""

    payload: T
    future: Future[R]


class Batcher(Generic[T, R]):
    """Runs `run(payloads)`, one result each, for submitted payloads in worker threads, which start here.

    Requests are started in order; with several workers they may end out of it. When a group fails, its requests are run
    again one by one, so that each fails for itself alone.
    clock: seconds, for deadlines and timeouts. Close it: an open batcher keeps its threads.
    """

    def __init__(
        self,
        run: Callable[[list[T]], list[R]],
        options: BatchOptions,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._metrics, self._clock, self._timeout = run, metrics, clock, options.timeout_s
        self._together = options.together
        self._queue: BoundedQueue[Request[T, R]] = BoundedQueue(
            options.max_queue, options.max_batch, options.max_wait_ms / 1e3
        )
        self._lock = threading.Lock()  # guards all that follows; no user code runs under it
        self._work = threading.Condition(self._lock)  # wakes a worker
        self._room = threading.Condition(self._lock)  # wakes submitters that wait for room
        self._ended = threading.Condition(self._lock)  # wakes `close` and the watchdog
        self._batch: deque[Entry[Request[T, R]]] = deque()  # taken from the queue, not started
        self._running: dict[int, tuple[list[Entry[Request[T, R]]], float]] = {}  # by worker; since when
        self._state: Literal["open", "closing", "ended", "hung"] = "open"
        self._workers = options.workers  # that have not ended
        self._threads = [
            threading.Thread(target=self._work_loop, args=(worker,), name=f"densegeo-batcher-{worker}", daemon=True)
            for worker in range(options.workers)
        ]
        if self._timeout is not None:
            self._threads.append(
                threading.Thread(target=self._watch_loop, args=(self._timeout,), name="densegeo-watchdog", daemon=True)
            )
        for thread in self._threads:
            thread.start()
        _OPEN.add(self)

    def admit(self, wait: bool = False) -> None:
        """Raise what `submit` would raise now, so that nobody prepares a request in vain."""
        self._drop_expired()
        with self._lock:
            self._require_room(wait)

    def submit(self, payload: T, key: Hashable, deadline_s: float = math.inf, wait: bool = False) -> Future[R]:
        """Queue a payload; payloads of one `key` may share a batch, and are run in order.

        deadline_s: seconds from now until it must have been started. wait: wait for room instead of raising.
        Raises QueueFullError, ShutdownError, BackendTimeoutError.
        """
        self._drop_expired()
        future: Future[R] = Future()
        with self._lock:
            self._require_room(wait)
            now = self._clock()
            ticket = self._queue.put(Request(payload, future), key, now, now + deadline_s)
            # The future may outlive the request by far, so it holds the ticket and not the payload.
            future.add_done_callback(partial(self._forget_cancelled, ticket))
            self._metrics.count("accepted")
            self._work.notify()
        return future

    def close(self, drain: bool = True, wait_s: float | None = None) -> bool:
        """Refuse new requests, then finish the accepted ones (drain) or fail those not yet started (ShutdownError).

        Waits until the worker has ended, `wait_s` seconds at most, and not at all when called by the worker itself
        (from a future's callback). Returns whether it has ended; it never does when the backend hangs.
        """
        with self._lock:
            if self._state == "open":
                self._state = "closing"
            unserved = [] if drain else self._take_waiting()
            self._work.notify_all()
            self._room.notify_all()
        self._fail(unserved, partial(ShutdownError, "The estimator was closed before this request was run."))
        if threading.current_thread() in self._threads:
            return False
        with self._lock:
            self._ended.wait_for(lambda: self._state in ("ended", "hung"), wait_s)
            if self._state != "ended":
                return False
        for thread in self._threads:
            thread.join()
        _OPEN.discard(self)
        return True

    def _work_loop(self, worker: int) -> None:
        failed = True
        try:
            while self._serve(worker):  # a frame of its own, so that nothing finished is kept alive meanwhile
                pass
            failed = False
        finally:
            with self._lock:
                unserved = self._take_waiting() if failed else []  # something raised that nobody foresaw
                self._workers -= 1
                if self._state != "hung" and (failed or self._workers == 0):
                    self._state = "closing" if self._workers else "ended"
                self._ended.notify_all()
                self._room.notify_all()
                self._work.notify_all()
            self._fail(unserved, partial(BackendError, "The estimator's worker thread failed. Make a new Estimator."))

    def _serve(self, worker: int) -> bool:
        """Run the next group; False when there will be none."""
        group = self._next(worker)
        return bool(group) and self._run_group(worker, group)

    def _next(self, worker: int) -> list[Entry[Request[T, R]]]:
        """Wait for the next group and make it the worker's running one; empty when there will be none."""
        late: list[Entry[Request[T, R]]]
        while True:
            late = []
            with self._lock:
                while not self._batch and (wait := self._queue.wait(self._clock())) > 0 and self._state == "open":
                    self._work.wait(min(wait, threading.TIMEOUT_MAX))
                if not self._batch:
                    batch, late = self._queue.take(self._clock())
                    self._batch.extend(batch)
                    self._room.notify_all()
                    if not batch and not late:
                        return []
                group = self._start_next(worker)
                if self._batch:
                    self._work.notify()  # for another worker
            self._expire(late)
            if group:
                return group

    def _start_next(self, worker: int) -> list[Entry[Request[T, R]]]:
        """Make the batch's next group the worker's, past the cancelled requests; the lock is held."""
        group: list[Entry[Request[T, R]]] = []
        while self._batch and len(group) < self._together:
            entry = self._batch.popleft()
            if entry.item.future.set_running_or_notify_cancel():
                group.append(entry)
        if group:
            self._running[worker] = group, self._clock()
        return group

    def _run_group(self, worker: int, group: list[Entry[Request[T, R]]]) -> bool:
        """Run a group; False when the watchdog has ended it meanwhile."""
        now = self._clock()
        live = [entry for entry in group if not entry.expired(now)]
        if live:
            self._metrics.count_group(len(live))
        outcomes = _attempt(self._run, [entry.item.payload for entry in live])
        with self._lock:
            if self._running.pop(worker, None) is None:
                return False
        for entry, outcome in zip(live, outcomes, strict=True):
            self._metrics.count(outcome.counter)
            outcome.deliver(entry.item.future)
        for entry in group:
            if entry not in live:
                self._metrics.count("expired")
                entry.item.future.set_exception(_deadline_error())
        return True

    def _watch_loop(self, timeout: float) -> None:
        with self._lock:
            while True:
                if self._state not in ("open", "closing"):
                    return
                oldest = min((since for _, since in self._running.values()), default=math.inf)
                seconds_left = timeout if oldest == math.inf else oldest + timeout - self._clock()
                if seconds_left <= 0:
                    break
                self._ended.wait(seconds_left)  # a request that starts meanwhile cannot be late before this ends
            self._state = "hung"
            stuck = [entry for group, _ in self._running.values() for entry in group]
            self._running.clear()
            behind = self._take_waiting()
            self._ended.notify_all()
            self._room.notify_all()
            self._work.notify_all()
        _OPEN.discard(self)
        for entry in stuck:
            self._metrics.count("failed")
            entry.item.future.set_exception(self._refusal())
        self._fail(behind, self._refusal)

    def _take_waiting(self) -> list[Entry[Request[T, R]]]:
        """Remove and return all requests that were not started; the lock is held."""
        waiting = [*self._batch, *self._queue.clear()]
        self._batch.clear()
        return waiting

    def _require_room(self, wait: bool) -> None:
        """Raise what a new request must get; the lock is held."""
        while wait and self._state == "open" and self._queue.full:
            self._room.wait()
        try:
            if self._state != "open":
                raise self._refusal()
            self._queue.require_room()
        except DensegeoError:
            self._metrics.count("rejected")
            raise

    def _refusal(self) -> BackendError:
        if self._state == "hung":
            return BackendTimeoutError(
                f"The backend did not return within timeout_s = {self._timeout:g} s. It cannot be stopped, so this "
                "estimator takes no more requests: make a new one, better in a new process."
            )
        return ShutdownError("This estimator is closed. Make a new Estimator.")

    def _drop_expired(self) -> None:
        """Free the places of requests that would not be run any more."""
        with self._lock:
            late = self._queue.expire(self._clock()) if self._queue.full else []
            if late:
                self._room.notify_all()
        self._expire(late)

    def _expire(self, entries: list[Entry[Request[T, R]]]) -> None:
        self._fail(entries, _deadline_error, "expired")

    def _fail(
        self, entries: list[Entry[Request[T, R]]], error: Callable[[], DensegeoError], counter: str = "failed"
    ) -> None:
        """End requests that were never started; each gets an exception of its own."""
        for entry in entries:
            future = entry.item.future
            if future.set_running_or_notify_cancel():
                self._metrics.count(counter)
                future.set_exception(error())

    def _forget_cancelled(self, ticket: int, future: Future[R]) -> None:
        """A future has ended: if by cancellation, count it and free its place."""
        if not future.cancelled():
            return
        self._metrics.count("cancelled")
        with self._lock:
            entry = self._queue.remove(ticket)
            self._room.notify()
        if entry is not None:  # else whoever took it out of the queue does this
            future.set_running_or_notify_cancel()


@dataclass(frozen=True, eq=False)
class _Ended(Generic[R]):
    """How a request ended: the counter of `Metrics`, and a result or an error."""

    counter: str
    result: R | None
    error: DensegeoError | None

    def deliver(self, future: Future[R]) -> None:
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(cast(R, self.result))


def _attempt(run: Callable[[list[T]], list[R]], payloads: list[T]) -> list[_Ended[R]]:
    """Run a group. A frame of its own: the traceback of an error must not hold the future that holds the error."""
    try:
        results = run(payloads) if payloads else []
        return [_Ended("completed", result, None) for _, result in zip(payloads, results, strict=True)]
    except BaseException as error:
        if len(payloads) == 1:
            return [_Ended("failed", None, _typed(error))]
    return [outcome for payload in payloads for outcome in _attempt(run, [payload])]


def _typed(error: BaseException) -> DensegeoError:
    if isinstance(error, DensegeoError):
        return error
    wrapped = BackendError(f"The request failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _deadline_error() -> DeadlineError:
    return DeadlineError("The deadline passed before this request's turn came; it was not run.")


_OPEN: WeakSet[Batcher[Any, Any]] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_OPEN.clear)  # their workers stayed in the parent


@atexit.register
def _close_all() -> None:
    """A worker inside a native library must not meet the interpreter's end: wait for it, but not for ever."""
    for batcher in list(_OPEN):
        batcher.close(drain=False, wait_s=EXIT_WAIT_S)
