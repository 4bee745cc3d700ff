"""The micro-batcher: every accepted request ends exactly once, whatever callers, clocks and backends do."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import numpy as np
import pytest

from densegeo.errors import (
    BackendError,
    BackendTimeoutError,
    ConfigError,
    DeadlineError,
    ImageError,
    QueueFullError,
    ShutdownError,
)
from densegeo.runtime import Estimator
from densegeo.runtime.batcher import Batcher, BatchOptions
from densegeo.runtime.request_metrics import COUNTERS, Metrics
from tests.support.doubles import Gate, constant_image, fake_estimator, level_of

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
T = 30  # seconds: far longer than anything here takes


BEFORE: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def before() -> None:
    """The threads of estimators that other tests keep open are not this test's."""
    BEFORE.clear()
    BEFORE.update(threading.enumerate())


def threads() -> set[str]:
    found = set(threading.enumerate()) - BEFORE
    return {thread.name for thread in found if thread.name.startswith("densegeo")}


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def make(gate: Gate) -> Iterator[Callable[..., Batcher]]:
    """Makes batchers around a gate or another function, and closes them at the end."""
    made: list[Batcher] = []

    def maker(run: Callable = gate, clock: Callable[[], float] = time.monotonic, **options: object) -> Batcher:
        def each(payloads: list) -> list:
            return [run(payload) for payload in payloads]

        made.append(Batcher(each, BatchOptions(**options), Metrics(), clock))
        return made[-1]

    yield maker
    gate.open()
    for batcher in made:
        batcher.close(drain=False)


def counts(batcher: Batcher) -> dict[str, int]:
    """The counters that are not 0."""
    return {name: value for name, value in batcher._metrics.snapshot().counters.items() if value}


def test_results_belong_to_their_requests(make: Callable[..., Batcher]) -> None:
    batcher = make(lambda payload: -payload)
    futures = [batcher.submit(i, key=None) for i in range(50)]
    assert [future.result(T) for future in futures] == [-i for i in range(50)]
    assert counts(batcher) == {"accepted": 50, "completed": 50}


@pytest.mark.parametrize(("max_batch", "order"), [(1, "abab"), (2, "aabb"), (8, "aabb")])
def test_batches_are_of_one_key_in_order_of_arrival(
    make: Callable[..., Batcher], gate: Gate, max_batch: int, order: str
) -> None:
    batcher = make(max_batch=max_batch)
    futures = [batcher.submit("first", key="first")]
    gate.wait_until_entered()
    futures += [batcher.submit((key, i), key) for i, key in enumerate("abab")]
    gate.open()
    wait(futures, T)
    assert [call[0] for call in gate.calls[1:]] == list(order)
    assert [i for key, i in gate.calls[1:] if key == "a"] == [0, 2]


def test_a_batch_is_run_in_groups(gate: Gate) -> None:
    with_groups = Batcher(gate, BatchOptions(max_batch=5, together=2, max_wait_ms=1e7), Metrics())  # type: ignore[arg-type]
    futures = [with_groups.submit(i, key=None) for i in range(5)]
    gate.wait_until_entered()
    assert not futures[0].cancel()
    assert not futures[1].cancel()
    assert futures[2].cancel()
    gate.open()
    assert [future.result(T) for future in futures if not future.cancelled()] == [0, 1, 3, 4]
    assert gate.calls == [[0, 1], [3, 4]]
    assert with_groups.close()
    assert counts(with_groups) == {"accepted": 5, "completed": 4, "cancelled": 1}


def test_a_failing_group_is_run_one_by_one() -> None:
    calls: list[list[int]] = []

    def run(payloads: list[int]) -> list[int]:
        calls.append(payloads)
        if 1 in payloads:
            raise ValueError(f"one of {len(payloads)} is odd")
        return payloads

    batcher = Batcher(run, BatchOptions(max_batch=3, together=3, max_wait_ms=1e7), Metrics())
    futures = [batcher.submit(i, key=None) for i in range(3)]
    assert (futures[0].result(T), futures[2].result(T)) == (0, 2)
    error = futures[1].exception(T)
    assert isinstance(error, BackendError)
    assert "one of 1 is odd" in str(error)
    assert calls == [[0, 1, 2], [0], [1], [2]]
    assert batcher.close()
    assert counts(batcher) == {"accepted": 3, "completed": 2, "failed": 1}


def test_a_backend_that_returns_too_few_results_fails_them_all() -> None:
    batcher = Batcher(lambda payloads: [], BatchOptions(max_batch=2, together=2, max_wait_ms=1e7), Metrics())
    futures = [batcher.submit(i, key=None) for i in range(2)]
    assert all(isinstance(future.exception(T), BackendError) for future in futures)
    assert batcher.close()


def test_an_expired_member_of_a_group_is_not_run() -> None:
    """Both are taken from the queue in time; the clock then jumps past the first one's deadline."""
    now, calls = [0.0], []

    def run(payloads: list[str]) -> list[str]:
        calls.append(payloads)
        now[0] = 10.0
        return payloads

    batcher = Batcher(run, BatchOptions(max_batch=3, together=2, max_wait_ms=1e7), Metrics(), lambda: now[0])
    futures = [batcher.submit(name, None, deadline) for name, deadline in (("a", 99), ("b", 99), ("c", 5))]
    assert isinstance(futures[2].exception(T), DeadlineError)
    assert [future.result(T) for future in futures[:2]] == ["a", "b"]
    assert calls == [["a", "b"]]
    assert batcher.close()
    assert counts(batcher) == {"accepted": 3, "completed": 2, "expired": 1}


def test_a_request_waits_for_others_but_not_longer_than_needed(make: Callable[..., Batcher], gate: Gate) -> None:
    gate.open()
    batcher = make(max_batch=2, max_wait_ms=1e7)
    lonely = batcher.submit(0, "a")
    other = batcher.submit(1, "b")
    assert not wait([lonely, other], 0.1).done
    lonely_no_more = batcher.submit(2, "a")
    assert wait([lonely, lonely_no_more], T).not_done == set()  # a full batch goes at once
    assert not other.done()
    hurried = batcher.submit(3, "c", deadline_s=0.2)  # goes after half of its time, and the older ones before it
    assert hurried.result(T) == 3
    assert gate.calls == [0, 2, 1, 3]


def test_draining_waits_for_nobody(make: Callable[..., Batcher], gate: Gate) -> None:
    gate.open()
    batcher = make(max_wait_ms=1e7)
    future = batcher.submit(0, "a")
    assert batcher.close()
    assert future.result(0) == 0


def test_a_full_queue_rejects_until_a_place_is_free(make: Callable[..., Batcher], gate: Gate) -> None:
    now = [0.0]
    batcher = make(max_queue=2, clock=lambda: now[0])
    running = batcher.submit("running", "a")
    gate.wait_until_entered()
    second, third = batcher.submit("second", "a"), batcher.submit("third", "a", deadline_s=5)
    for refused in (lambda: batcher.submit("no", "a"), batcher.admit):
        with pytest.raises(QueueFullError, match="max_queue"):
            refused()
    assert second.cancel()
    fourth = batcher.submit("fourth", "a")  # in the cancelled one's place
    now[0] = 6.0
    fifth = batcher.submit("fifth", "a")  # in the expired one's place
    assert isinstance(third.exception(0), DeadlineError)
    gate.open()
    assert [future.result(T) for future in (running, fourth, fifth)] == ["running", "fourth", "fifth"]
    assert counts(batcher) == {"accepted": 5, "completed": 3, "cancelled": 1, "expired": 1, "rejected": 2}


def test_submitters_may_wait_for_room(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make(max_queue=1)
    futures = [batcher.submit(0, "a")]
    gate.wait_until_entered()
    futures.append(batcher.submit(1, "a"))
    waiting = threading.Thread(target=lambda: futures.append(batcher.submit(2, "a", wait=True)))
    waiting.start()
    waiting.join(0.05)
    assert len(futures) == 2
    gate.open()
    waiting.join(T)
    assert [future.result(T) for future in futures] == [0, 1, 2]


def test_expired_requests_are_not_run_and_late_results_are_delivered(make: Callable[..., Batcher], gate: Gate) -> None:
    now = [0.0]
    batcher = make(clock=lambda: now[0])
    late = batcher.submit("late", "a", deadline_s=1)
    gate.wait_until_entered()
    patient, expired = batcher.submit("patient", "a", deadline_s=9), batcher.submit("expired", "a", deadline_s=1)
    now[0] = 2.0
    gate.open()
    assert late.result(T) == "late"
    assert patient.result(T) == "patient"
    with pytest.raises(DeadlineError, match="not run"):
        expired.result(T)
    assert gate.calls == ["late", "patient"]
    assert counts(batcher) == {"accepted": 3, "completed": 2, "expired": 1}


def test_a_deadline_that_passes_within_a_batch_counts_too(make: Callable[..., Batcher], gate: Gate) -> None:
    now = [0.0]
    batcher = make(clock=lambda: now[0])
    futures = [batcher.submit(0, "other")]
    gate.wait_until_entered()
    futures += [batcher.submit(1, "a"), batcher.submit(2, "a", deadline_s=1)]
    gate.open(1)
    gate.wait_until_entered()  # 1 is run, and 2 is in its batch
    now[0] = 2.0
    gate.open()
    assert futures[1].result(T) == 1
    assert isinstance(futures[2].exception(T), DeadlineError)
    assert gate.calls == [0, 1]


def test_cancellation(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make()
    running = batcher.submit(0, "b")
    gate.wait_until_entered()
    queued, batched = batcher.submit(1, "a"), batcher.submit(2, "b")
    assert not running.cancel()
    assert queued.cancel()
    assert queued.cancel(), "cancelling twice"
    assert wait([queued], 0).done == {queued}, "whoever waits must hear of it at once"
    gate.open(1)
    assert running.result(T) == 0
    gate.wait_until_entered()
    behind = batcher.submit(3, "b")
    assert behind.cancel()
    gate.open()
    assert batched.result(T) == 2
    with pytest.raises(CancelledError):
        queued.result(0)
    batcher.close()
    assert gate.calls == [0, 2]
    assert counts(batcher) == {"accepted": 4, "completed": 2, "cancelled": 2}


def test_a_request_may_be_cancelled_within_its_batch(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make()
    futures = [batcher.submit(0, "other")]
    gate.wait_until_entered()
    futures += [batcher.submit(i, "a") for i in (1, 2, 3)]
    gate.open(1)
    gate.wait_until_entered()
    assert futures[2].cancel()
    gate.open()
    assert wait(futures, T).not_done == set()
    assert gate.calls == [0, 1, 3]
    assert counts(batcher) == {"accepted": 4, "completed": 3, "cancelled": 1}


@pytest.mark.parametrize("error", [BackendError("broken"), ValueError("broken"), SystemExit("broken")])
def test_a_failure_is_typed_and_the_next_request_is_served(make: Callable[..., Batcher], error: BaseException) -> None:
    def run(payload: int) -> int:
        if payload == 0:
            raise error
        return payload

    batcher = make(run)
    futures = [batcher.submit(i, "a") for i in range(3)]
    with pytest.raises(BackendError, match="broken") as caught:
        futures[0].result(T)
    assert error in (caught.value, caught.value.__cause__)
    assert [future.result(T) for future in futures[1:]] == [1, 2]
    assert counts(batcher) == {"accepted": 3, "completed": 2, "failed": 1}


def test_a_callback_that_kills_the_worker_loses_nobody(
    make: Callable[..., Batcher], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    batcher = make()
    futures = [batcher.submit(i, "a") for i in range(3)]
    gate.wait_until_entered()

    def leave(_: Future) -> None:
        raise SystemExit

    futures[0].add_done_callback(leave)
    gate.open()
    assert futures[0].result(T) == 0
    for future in futures[1:]:
        assert isinstance(future.exception(T), BackendError)
    with pytest.raises(ShutdownError):
        batcher.submit(3, "a")
    assert batcher.close()


def test_closing_with_draining_finishes_what_was_accepted(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make()
    futures = [batcher.submit(i, key=i % 2) for i in range(9)]
    gate.wait_until_entered()
    closers = [threading.Thread(target=batcher.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    while batcher._state == "open":
        time.sleep(0.001)
    for refused in (lambda: batcher.submit(9, 0), batcher.admit):
        with pytest.raises(ShutdownError, match="closed"):
            refused()
    gate.open()
    for closer in closers:
        closer.join(T)
    assert [future.result(0) for future in futures] == list(range(9))
    assert counts(batcher) == {"accepted": 9, "completed": 9, "rejected": 2}
    assert batcher.close(), "closing twice"


def test_closing_without_draining_fails_what_was_not_started(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make(max_queue=3)
    futures = [batcher.submit(0, "a")]
    gate.wait_until_entered()
    futures += [batcher.submit(i, "a") for i in (1, 2, 3)]
    refused: list[object] = []

    def wait_for_room() -> None:
        with pytest.raises(ShutdownError):
            batcher.submit(4, "a", wait=True)
        refused.append(4)

    waiting = threading.Thread(target=wait_for_room)
    waiting.start()
    closer = threading.Thread(target=batcher.close, args=(False,))
    closer.start()
    for future in futures[1:]:
        assert isinstance(future.exception(T), ShutdownError)
    assert futures[1].exception() is not futures[2].exception()  # a shared one would collect tracebacks
    gate.open()
    closer.join(T)
    waiting.join(T)
    assert futures[0].result(0) == 0, "the running one is finished"
    assert (gate.calls, refused) == ([0], [4])


def test_closing_from_a_callback_does_not_wait_for_itself(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make()
    futures = [batcher.submit(i, "a") for i in range(3)]
    gate.wait_until_entered()
    closed: list[bool] = []
    futures[0].add_done_callback(lambda _: closed.append(batcher.close()))
    gate.open()
    assert [future.result(T) for future in futures] == [0, 1, 2]
    assert closed == [False]
    assert batcher.close()


def test_a_hanging_backend_ends_everything_typed(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make(timeout_s=0.1, max_queue=3)
    gate.open(1)
    assert batcher.submit("fast", "a").result(T) == "fast"
    gate.wait_until_entered()
    futures = [batcher.submit("hangs", "a")]
    gate.wait_until_entered()
    futures += [batcher.submit(i, key) for i, key in enumerate("aba")]
    assert futures[1].cancel()
    for future in (futures[0], *futures[2:]):
        with pytest.raises(BackendTimeoutError, match=r"0\.1 s"):
            future.result(T)
    for refused in (lambda: batcher.submit("new", "a"), batcher.admit, lambda: batcher.submit("new", "a", wait=True)):
        with pytest.raises(BackendTimeoutError):
            refused()
    assert not batcher.close()
    assert not batcher.close(drain=False)
    assert counts(batcher) == {"accepted": 5, "completed": 1, "failed": 3, "cancelled": 1, "rejected": 3}
    gate.open()  # the backend comes back after all: its result is thrown away and its thread ends
    for thread in batcher._threads:
        thread.join(T)
        assert not thread.is_alive()
    assert gate.calls == ["fast", "hangs"]
    assert counts(batcher)["completed"] == 1


def test_time_between_requests_is_not_the_backends(make: Callable[..., Batcher], gate: Gate) -> None:
    gate.open()
    batcher = make(timeout_s=0.05)
    for i in range(3):
        assert batcher.submit(i, "a").result(T) == i
        time.sleep(0.08)
    assert batcher.close()


def test_workers_run_together(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make(workers=2)
    futures = [batcher.submit(number, "key") for number in range(5)]
    gate.wait_until_entered()
    gate.wait_until_entered()  # the second is inside before the first has left
    assert sorted(gate.calls) == [0, 1]
    gate.open()
    assert [future.result(T) for future in futures] == list(range(5))
    assert batcher.close()
    assert not threads()
    assert counts(batcher) == {"accepted": 5, "completed": 5}


def test_a_hang_in_one_lane_ends_what_runs_in_the_other(make: Callable[..., Batcher], gate: Gate) -> None:
    now = [0.0]
    batcher = make(workers=2, timeout_s=5.0, clock=lambda: now[0])
    first = batcher.submit(0, "key")
    gate.wait_until_entered()
    now[0] = 3.0
    second = batcher.submit(1, "key")
    gate.wait_until_entered()
    behind = batcher.submit(2, "key")
    now[0] = 5.0  # the first has been with the backend for too long, the second for 2 s
    with batcher._lock:
        batcher._ended.notify_all()  # the watchdog sleeps by the real clock
    for future in (first, second, behind):
        with pytest.raises(BackendTimeoutError):
            future.result(T)
    with pytest.raises(BackendTimeoutError):
        batcher.submit(3, "key")
    gate.open()
    for thread in batcher._threads:
        thread.join(T)
    assert counts(batcher) == {"accepted": 3, "failed": 3, "rejected": 1}


def test_a_lane_that_dies_loses_nobody(make: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    gates = [Gate() for _ in range(3)]
    batcher = make(run=lambda number: gates[number](number), workers=2)
    futures = [batcher.submit(number, "key") for number in range(3)]

    def leave(_: Future) -> None:
        raise SystemExit

    futures[0].add_done_callback(leave)
    for gate in gates[:2]:
        gate.wait_until_entered()
    gates[0].open()
    with pytest.raises(BackendError, match="worker thread failed"):
        futures[2].result(T)
    with pytest.raises(ShutdownError):
        batcher.submit(3, "key")
    gates[1].open()
    assert futures[1].result(T) == 1  # the other worker finishes what it runs
    assert batcher.close()
    assert not threads()


def test_finished_requests_are_not_kept_alive(make: Callable[..., Batcher]) -> None:
    """Neither by their futures nor by the worker, which has nothing else to do."""
    batcher = make(lambda payload: payload + 1)
    payload = np.ones(5)
    watched = [weakref.ref(payload)]
    future = batcher.submit(payload, "a")
    del payload
    watched.append(weakref.ref(future.result(T)))
    end = time.monotonic() + T
    while watched[0]() is not None and time.monotonic() < end:
        time.sleep(0.001)
    assert watched[0]() is None, "the image lives"
    del future
    while watched[1]() is not None and time.monotonic() < end:
        time.sleep(0.001)
    assert watched[1]() is None, "the result lives"


def test_a_cancellation_lets_a_waiting_submitter_in(make: Callable[..., Batcher], gate: Gate) -> None:
    batcher = make(max_queue=1)
    batcher.submit(0, "a")
    gate.wait_until_entered()
    queued, entered = batcher.submit(1, "a"), threading.Event()

    def submit() -> None:
        batcher.submit(2, "a", wait=True)
        entered.set()

    waiting = threading.Thread(target=submit)
    waiting.start()
    assert not entered.wait(0.05)
    assert queued.cancel()
    assert entered.wait(T)
    waiting.join(T)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_batch": 1.5},
        {"max_queue": 0},
        {"max_wait_ms": -1},
        {"max_wait_ms": float("nan")},
        {"timeout_s": 0},
        {"timeout_s": float("inf")},
    ],
)
def test_bad_options(bundle: Path, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Estimator(bundle, device="cpu", **options)


def test_submit_gives_what_a_call_gives(bundle: Path, picture: np.ndarray) -> None:
    before = threads()
    with Estimator(bundle, device="cpu", timeout_s=60) as estimator:
        expected = estimator(picture)
        assert threads() == before, "a thread without a submit"
        image = picture[..., ::-1].copy()
        future = estimator.submit(image, "bgr", deadline_ms=60_000)
        image[:] = 0  # the image was read by `submit`
        result = future.result(T)
        assert threads() == before | {"densegeo-batcher-0", "densegeo-watchdog"}
        with pytest.raises(ImageError):
            estimator.submit("nowhere.png")
        for wrong in (0, -1, float("nan")):
            with pytest.raises(ConfigError, match="deadline_ms"):
                estimator.submit(picture, deadline_ms=wrong)
    assert threads() == before
    np.testing.assert_array_equal(result.prediction, expected.prediction)
    np.testing.assert_array_equal(result.normals, expected.normals)
    assert set(result.timings) == {*expected.timings, "queue"}
    with pytest.raises(ShutdownError, match="closed"):
        estimator.submit(picture)
    counters = estimator.metrics.snapshot().counters
    assert counters == dict.fromkeys(COUNTERS, 0) | {"accepted": 2, "completed": 2, "rejected": 1}


def test_submit_rejects_and_does_not_wait(bundle: Path, gate: Gate) -> None:
    with fake_estimator(bundle, lambda bucket, stage, value: gate(value), max_queue=1) as estimator:
        futures = [estimator.submit(constant_image(0.5))]
        gate.wait_until_entered()
        futures.append(estimator.submit(constant_image(0.6)))
        for image in (constant_image(0.7), "nowhere.png"):  # the image is not even read
            with pytest.raises(QueueFullError):
                estimator.submit(image)
        gate.open()
    assert [level_of(future.result(0).prediction) for future in futures] == pytest.approx([0.5, 0.6], abs=1e-6)
    assert estimator.metrics.snapshot().counters["rejected"] == 2


def test_leaving_the_block_drains(bundle: Path) -> None:
    levels = [0.5 + 0.01 * i for i in range(20)]
    with fake_estimator(bundle, lambda *_: time.sleep(0.001)) as estimator:
        futures = [estimator.submit(constant_image(level)) for level in levels]
    assert [level_of(future.result(0).prediction) for future in futures] == pytest.approx(levels, abs=1e-6)
    assert estimator._backend.closed


def test_a_deadline_starts_with_the_call(bundle: Path, gate: Gate) -> None:
    with fake_estimator(bundle, lambda bucket, stage, value: stage != "encoder" or gate(value)) as estimator:
        estimator.submit(constant_image(0.5))
        gate.wait_until_entered()
        future = estimator.submit(constant_image(0.6), deadline_ms=1e-3)  # over before the image is resized
        gate.open()
        with pytest.raises(DeadlineError):
            future.result(T)
    assert len(gate.calls) == 1


def test_an_estimator_with_a_hanging_backend_closes(bundle: Path, gate: Gate) -> None:
    estimator = fake_estimator(bundle, lambda bucket, stage, value: gate(value), timeout_s=0.1)
    with estimator:
        futures = [estimator.submit(constant_image(0.5)) for _ in range(3)]
        for future in futures:
            assert isinstance(future.exception(T), BackendTimeoutError)
        with pytest.raises(BackendTimeoutError):
            estimator.submit(constant_image(0.5))
    assert not estimator._backend.closed, "it is still being used by the stuck thread"
    gate.open()
    for thread in estimator._service._batcher._threads:
        thread.join(T)


EXIT = """
import sys, threading, time
import densegeo.runtime.batcher as b
from densegeo.runtime.request_metrics import Metrics
entered = threading.Event()
def run(payloads):
    entered.set()
    {run}
    return payloads
batcher = b.Batcher(run, b.BatchOptions(timeout_s={timeout}), Metrics())
futures = [batcher.submit(i, "a") for i in range(3)]
futures[2].add_done_callback(lambda future: print(type(future.exception()).__name__))
entered.wait()
{last}
"""


@pytest.mark.parametrize(
    ("run", "timeout", "last", "ending"),
    [
        ("time.sleep(0.2)", None, "", "ShutdownError"),  # an estimator that nobody closed
        ("threading.Event().wait()", 0.2, "wait = futures[2].exception()", "BackendTimeoutError"),  # a noticed hang
        ("threading.Event().wait()", None, "b.EXIT_WAIT_S = 0.2", "ShutdownError"),  # an unnoticed one
    ],
)
def test_the_interpreter_leaves(run: str, timeout: float | None, last: str, ending: str) -> None:
    code = EXIT.format(run=run, timeout=timeout, last=last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=T, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == ending
