"""The micro-batcher: every accepted request ends exactly once, whatever callers, clocks and backends do."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest

from densegeo.errors import (
    BackendError,
    DeadlineError,
    QueueFullError,
)
from densegeo.runtime.batcher import Batcher, BatchOptions
from densegeo.runtime.request_metrics import Metrics
from tests.support.batchers import T, counts
from tests.support.doubles import Gate

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


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
