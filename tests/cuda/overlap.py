"""What runs beside what: frames in flight, held at chosen points, with their streams brought forward one by one.

Work of the stand-in driver is done when somebody waits for it. So a copy that ends while networks are held shows that
it does not wait for them, and a stream that cannot be brought there shows that it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from densegeo.runtime import Estimator
from densegeo.runtime.backends.cuda_memory import host_view
from densegeo.runtime.backends.cuda_ring import Slot
from tests.cuda.engine_double import StandInContext
from tests.cuda.exercise import Setup

LONG_S = 20  # nothing here takes as long


class Gate:
    """Holds a thread where it passes, until it is opened."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def pass_by(self) -> None:
        self.reached.set()
        assert self._opened.wait(2 * LONG_S), "nobody opened the gate"

    def wait(self, what: str) -> None:
        assert self.reached.wait(LONG_S), f"{what} was not reached"

    def open(self) -> None:
        self._opened.set()


class Frames:
    """Two frames in flight, each on a thread of its own, with a gate in front of the second engine of one of them."""

    def __init__(self, setup: Setup, estimator: Estimator, pool: ThreadPoolExecutor) -> None:
        self._setup, self._estimator, self._pool = setup, estimator, pool
        self._backend: Any = estimator._backend
        self.gates: list[Gate] = []

    def start(self, index: int) -> Future[Any]:
        return self._pool.submit(self._estimator, self._setup.images[index])

    def gate(self) -> Gate:
        self.gates.append(Gate())
        return self.gates[-1]

    def bring_forward(self, stream: str) -> Future[Any]:
        """Do what one of the memory's streams was given."""

        def sync() -> None:
            with self._backend._memory.current():
                getattr(self._backend._memory, stream).sync()

        return self._pool.submit(sync)

    def launched(self, count: int, since: dict[str, int]) -> None:
        """So many frames' networks have been launched."""
        for _ in range(100 * LONG_S):
            if self._setup.driver.statistics()["graph launches"] - since["graph launches"] >= count:
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"{count} frames were not in flight at once: the second was not launched")


@contextmanager
def in_flight(setup: Setup, estimator: Estimator) -> Iterator[Frames]:
    """Frames whose gates are opened at the end, whatever happened."""
    with ThreadPoolExecutor(6) as pool:
        frames = Frames(setup, estimator, pool)
        try:
            yield frames
        finally:
            for gate in frames.gates:
                gate.open()


@contextmanager
def held_networks(gate: Gate, which: int) -> Iterator[None]:
    """The networks of frame `which`, counted from now on, are held at the gate when their stream comes to them."""
    run, count = StandInContext._run, [0]

    def held(self: StandInContext, addresses: dict[str, int]) -> None:
        if self._engine.record.stage == "encoder":
            count[0] += 1
            if count[0] == which + 1:
                gate.pass_by()
        run(self, addresses)

    with patch.object(StandInContext, "_run", held):
        yield


def copies_in_run_under_networks(setup: Setup, estimator: Estimator) -> list[Any]:
    """While the networks of one frame run, the next frame is copied in and launched; and what both give."""
    before = setup.driver.statistics()
    with in_flight(setup, estimator) as frames:
        networks = frames.gate()
        with held_networks(networks, 0), noted(Slot, "upload") as uploads:
            first = frames.start(0)
            networks.wait("the first frame's network")
            second = frames.start(1)
            frames.launched(2, before)  # so nobody holds the lock while the first frame's networks run
            frames.bring_forward("copying_in").result(LONG_S)
            slot, places = uploads[1]
            there = setup.driver.view(places[0].address, setup.images[1].shape, np.uint8, what="the second frame")
            assert np.array_equal(there, setup.images[1]), "the second frame waits for the first one's networks"
            assert slot is not uploads[0][0]
            assert not first.done()
            networks.open()
            return [first.result(LONG_S), second.result(LONG_S)]


def copies_back_run_under_networks(setup: Setup, estimator: Estimator) -> list[Any]:
    """While the networks of one frame run, the maps of the one before go back; and what both give."""
    before = setup.driver.statistics()
    with in_flight(setup, estimator) as frames:
        networks, waiting = frames.gate(), [frames.gate(), frames.gate()]
        slots: list[Slot] = []
        results = Slot.results

        def held(self: Slot) -> list[NDArray[np.float32]]:
            slots.append(self)
            if len(slots) == 1:
                host_view(self._pinned_out, self._starts[-1])[:] = 0xEE
            waiting[len(slots) - 1].pass_by()
            return results(self)

        with held_networks(networks, 1), patch.object(Slot, "results", held):
            first = frames.start(0)
            waiting[0].wait("the end of the first frame's launches")
            second = frames.start(1)
            frames.launched(2, before)
            waiting[1].wait("the end of the second frame's launches")
            frames.bring_forward("stream")
            networks.wait("the second frame's network")
            mine = slots[0]
            assert (host_view(mine._pinned_out, mine._starts[-1]) == 0xEE).all(), "networks wait for the copy back"
            waiting[0].open()
            ended = first.result(LONG_S)  # its maps come back while the second frame's networks are held
            assert not second.done()
            networks.open()
            waiting[1].open()
            return [ended, second.result(LONG_S)]


@contextmanager
def noted(kind: type, name: str) -> Iterator[list[tuple[Any, Any]]]:
    """(object, result) of each call of a method."""
    calls: list[tuple[Any, Any]] = []
    method: Callable[..., Any] = getattr(kind, name)

    def noting(self: Any, *given: Any) -> Any:
        result = method(self, *given)
        calls.append((self, result))
        return result

    with patch.object(kind, name, noting):
        yield calls
