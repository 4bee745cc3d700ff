"""How the micro-batcher fails, closes and hangs: every accepted request ends exactly once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from densegeo.errors import (
    BackendError,
    BackendTimeoutError,
    ShutdownError,
)
from densegeo.runtime.batcher import Batcher
from tests.support.batchers import T, counts
from tests.support.doubles import Gate

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


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


def test_workers_run_together(
    make: Callable[..., Batcher], gate: Gate, started_threads: Callable[[], set[str]]
) -> None:
    batcher = make(workers=2)
    futures = [batcher.submit(number, "key") for number in range(5)]
    gate.wait_until_entered()
    gate.wait_until_entered()  # the second is inside before the first has left
    assert sorted(gate.calls) == [0, 1]
    gate.open()
    assert [future.result(T) for future in futures] == list(range(5))
    assert batcher.close()
    assert not started_threads()
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


def test_a_lane_that_dies_loses_nobody(
    make: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch, started_threads: Callable[[], set[str]]
) -> None:
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
    assert not started_threads()


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
