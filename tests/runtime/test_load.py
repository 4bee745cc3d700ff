"""`submit` and `stream` under load: 8 threads, failures, cancellations, deadlines, rejections and hangs.

Every request must end exactly once, with its own result or a typed error, and leave nothing behind.
"""

from __future__ import annotations

import gc
import random
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest

from densegeo.errors import BackendError, BackendTimeoutError, DeadlineError, QueueFullError, ShutdownError
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import Bucket, Stage
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.request_metrics import COUNTERS
from tests.support.doubles import Gate, constant_image, fake_estimator, level_of

pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.integration,
]
THREADS, REQUESTS, ROUND = 8, 10_000, 50
SIZES = ((16, 16), (32, 16))


def level(thread: int, number: int) -> float:
    """A level in [0.5, 0.7] that belongs to this request alone."""
    return 0.5 + 0.2 * (thread * REQUESTS / THREADS + number) / REQUESTS


def request_of(value: float) -> tuple[int, int]:
    """(thread, number) of a level."""
    return divmod(round((value - 0.5) / 0.2 * REQUESTS), REQUESTS // THREADS)


def fails(thread: int, number: int) -> bool:
    return random.Random(f"{thread} {number}").random() < 0.05


class Flaky:
    """A backend's hook that fails for some requests, at times is slow, and notes the order of what was run."""

    def __init__(self) -> None:
        self.order: list[tuple[int, int, int]] = []  # thread, number, width

    def __call__(self, bucket: Bucket, stage: Stage, value: float) -> None:
        if stage == "encoder":
            thread, number = request_of((value + 1) / 2)
            self.order.append((thread, number, bucket.width))
            if len(self.order) % 500 == 0:
                time.sleep(0.05)  # the queue fills, and deadlines pass
            if fails(thread, number):
                raise BackendError(f"failed on purpose: {thread} {number}")


class Caller:
    """One thread's requests: submits them in rounds and settles each round before the next."""

    def __init__(self, estimator: Estimator, thread: int, requests: int) -> None:
        self.estimator, self.thread, self.requests = estimator, thread, requests
        self.random = random.Random(thread)
        self.outcomes: Counter[str] = Counter()
        self.endings: Counter[int] = Counter()  # callbacks by request
        self.most_threads = 0

    def __call__(self) -> None:
        for start in range(0, self.requests, ROUND):
            futures = {number: self.submit(number) for number in range(start, min(start + ROUND, self.requests))}
            for number, future in futures.items():
                self.outcomes["rejected" if future is None else self.settle(number, future)] += 1
            self.most_threads = max(self.most_threads, threading.active_count())

    def submit(self, number: int) -> Future[Geometry] | None:
        width, height = SIZES[number % 2]
        deadline_ms = self.random.choice((None, None, None, 20_000.0, 0.5))
        try:
            image = constant_image(level(self.thread, number), width, height)
            future = self.estimator.submit(image, deadline_ms=deadline_ms)
        except QueueFullError:
            time.sleep(0.005)
            return None
        future.add_done_callback(lambda _: self.endings.update([number]))
        if self.random.random() < 0.1:
            future.cancel()
        return future

    def settle(self, number: int, future: Future[Geometry]) -> str:
        try:
            result = future.result(30)
        except CancelledError:
            return "cancelled"
        except DeadlineError:
            return "expired"
        except BackendError as error:
            return "failed" if str(error) == f"failed on purpose: {self.thread} {number}" else str(error)
        assert not fails(self.thread, number)
        assert level_of(result.prediction) == pytest.approx(level(self.thread, number), abs=1e-6)
        assert result.source_size == SIZES[number % 2]
        return "completed"


def run_callers(estimator: Estimator, requests: int, run_in_threads: Callable[..., list[object]]) -> list[Caller]:
    callers = [Caller(estimator, thread, requests // THREADS) for thread in range(THREADS)]
    for outcome in run_in_threads(lambda index: callers[index](), THREADS):
        if outcome is not None:
            raise outcome
    return callers


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.thorough
def test_ten_thousand_requests(new_bundle: Callable[..., Path], run_in_threads: Callable[..., list[object]]) -> None:
    flaky = Flaky()
    before = threading.active_count()
    with fake_estimator(new_bundle(sizes=SIZES), flaky, timeout_s=20, max_queue=128) as estimator:
        run_callers(estimator, 400, run_in_threads)  # caches fill
        flaky.order.clear()
        warm, objects_before = estimator.metrics.snapshot().counters, objects()
        began = time.perf_counter()
        callers = run_callers(estimator, REQUESTS, run_in_threads)
        seconds = time.perf_counter() - began
        outcomes = sum((caller.outcomes for caller in callers), Counter())
        ended = sum(sum(caller.endings.values()) for caller in callers)
        assert all(set(caller.endings.values()) == {1} for caller in callers), "a request ended twice"
        most_threads = max(caller.most_threads for caller in callers)
        assert len(set(flaky.order)) == len(flaky.order), "a request was run twice"
        for thread in range(THREADS):
            for width, _ in SIZES:
                numbers = [number for who, number, size in flaky.order if (who, size) == (thread, width)]
                assert numbers == sorted(numbers), "one caller's requests of one bucket were run out of order"
        del callers, numbers
        flaky.order.clear()
        new_objects = objects() - objects_before
        counters = {name: value - warm[name] for name, value in estimator.metrics.snapshot().counters.items()}
    print(f"\n{dict(outcomes)} in {seconds:.1f} s, {most_threads - before} threads, {new_objects} objects more")
    assert sum(outcomes.values()) == REQUESTS
    assert ended == REQUESTS - outcomes["rejected"] == counters["accepted"]
    assert counters == {"accepted": ended, "dropped": 0} | {
        name: outcomes[name] for name in COUNTERS if name not in ("accepted", "dropped")
    }
    assert all(outcomes[name] > 0 for name in ("completed", "failed", "expired", "cancelled", "rejected"))
    assert outcomes["completed"] > REQUESTS // 4, "a load test that serves hardly anybody"
    assert most_threads <= before + THREADS + 2
    assert threading.active_count() == before
    assert new_objects < 200, "objects left by 10,000 requests"
    assert seconds < 25


@pytest.mark.thorough
def test_memory_does_not_grow(new_bundle: Callable[..., Path], run_in_threads: Callable[..., list[object]]) -> None:
    """Allocations traced over fewer requests, since tracing makes them three times as slow."""
    flaky = Flaky()
    with fake_estimator(new_bundle(sizes=SIZES), flaky, timeout_s=20, max_queue=128) as estimator:
        run_callers(estimator, 400, run_in_threads)
        flaky.order.clear()
        objects()
        tracemalloc.start()
        try:
            run_callers(estimator, 2000, run_in_threads)
            flaky.order.clear()
            objects()
            grown = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    print(f"\n{grown / 1024:.0f} KiB more after 2000 requests")
    assert grown < 100 * 1024  # the images and results of 2000 requests are 30 MiB


@pytest.mark.parametrize("round_", range(3))
def test_a_hang_under_load(
    new_bundle: Callable[..., Path], run_in_threads: Callable[..., list[object]], round_: int
) -> None:
    """Everybody's requests end with the hang's error, and nobody is left waiting."""
    gate, seen = Gate(), Counter()
    before = threading.active_count()

    def hook(bucket: Bucket, stage: Stage, value: float) -> None:
        seen[stage] += 1
        if seen["encoder"] == 100:
            gate(stage)

    estimator = fake_estimator(new_bundle(sizes=SIZES), hook, timeout_s=0.3)

    def call(thread: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        futures = []
        for number in range(100):
            try:
                futures.append(estimator.submit(constant_image(level(thread, number))))
            except QueueFullError:
                outcomes["full"] += 1
                time.sleep(0.005)
            except BackendTimeoutError:
                outcomes["refused"] += 1
        for future in futures:
            outcomes[type(future.exception(30)).__name__] += 1
        return outcomes

    outcomes = sum(run_in_threads(call, THREADS), Counter())
    estimator.close()
    assert sum(outcomes.values()) == 100 * THREADS
    assert set(outcomes) <= {"full", "refused", "NoneType", "BackendTimeoutError"}
    assert outcomes["NoneType"] == 99, "those before the hang have results"
    counters = estimator.metrics.snapshot().counters
    assert (counters["completed"], counters["failed"]) == (99, outcomes["BackendTimeoutError"])
    assert counters["accepted"] == counters["completed"] + counters["failed"]
    gate.open()
    for thread in estimator._service._batcher._threads:
        thread.join(30)
    assert threading.active_count() == before


@pytest.mark.parametrize("drain", [True, False])
def test_closing_under_load(
    new_bundle: Callable[..., Path], run_in_threads: Callable[..., list[object]], drain: bool
) -> None:
    """`close` in the midst of submits: whoever was accepted ends, whoever comes later is refused."""
    estimator = fake_estimator(new_bundle(sizes=SIZES), max_queue=1000)
    closing = threading.Event()

    def call(thread: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        if thread == 0:
            closing.wait(30)
            estimator.close(drain)
            return outcomes
        futures = []
        for number in range(10_000):
            try:
                futures.append(estimator.submit(constant_image(level(thread, number % 100))))
            except ShutdownError:
                break
            except QueueFullError:
                continue
            if number == 50:
                closing.set()
        for future in futures:
            outcomes[type(future.exception(30)).__name__] += 1
        return outcomes

    results = run_in_threads(call, THREADS)
    outcomes = sum(results, Counter())
    counters = estimator.metrics.snapshot().counters
    assert counters["accepted"] == sum(outcomes.values())
    assert counters["completed"] == outcomes["NoneType"] > 0
    assert set(outcomes) <= ({"NoneType"} if drain else {"NoneType", "ShutdownError"})


def test_two_cameras_and_submitters_at_once(
    new_bundle: Callable[..., Path], run_in_threads: Callable[..., list[object]]
) -> None:
    """A latest-only stream, a stream of every frame and single requests share one worker; nothing is mixed up."""
    frames, singles = 300, 200
    with fake_estimator(new_bundle(sizes=SIZES), timeout_s=20) as estimator:
        latest, every = estimator.stream(), estimator.stream(latest=False, depth=3)

        def camera(thread: int) -> None:
            stream = (latest, every)[thread]
            for number in range(frames):
                stream.put(constant_image(level(thread, number)), stamp=number / 10, frame_id=(thread, number))
            stream.close()

        def consumer(thread: int) -> list[int]:
            numbers = []
            for result in (latest, every)[thread]:
                _, number = result.frame_id
                assert result.frame_id == (thread, number)
                assert result.stamp == number / 10
                assert request_of(level_of(result.geometry.prediction)) == (thread, number)
                numbers.append(number)
            return numbers

        def submitter(thread: int) -> None:
            for number in range(singles):
                result = estimator.submit(constant_image(level(thread, number))).result(30)
                assert request_of(level_of(result.prediction)) == (thread, number)

        calls = [lambda: camera(0), lambda: camera(1), lambda: consumer(0), lambda: consumer(1)]
        calls += [lambda: submitter(2), lambda: submitter(3)]
        results = run_in_threads(lambda index: calls[index](), len(calls))
    for result in results:
        if isinstance(result, BaseException):
            raise result
    newest, all_ = results[2], results[3]
    assert all_ == list(range(frames))
    assert newest == sorted(set(newest))
    assert newest[-1] == frames - 1
    assert latest.dropped == frames - len(newest)
    counters = estimator.metrics.snapshot().counters
    assert counters["dropped"] == latest.dropped
    assert counters["completed"] == counters["accepted"] == len(newest) + frames + 2 * singles
