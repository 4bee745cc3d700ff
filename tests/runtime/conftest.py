"""Bundles of the runtime's tests, micro-batchers, and threads that start together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from densegeo.runtime.batcher import Batcher, BatchOptions
from densegeo.runtime.request_metrics import Metrics
from tests.support.doubles import Gate
from tests.support.shared import BUILT_SIZES

if TYPE_CHECKING:
    from densegeo.models.loading import Files


@pytest.fixture(scope="session")
def bundle(toy_bundle: Path) -> Path:
    """A bundle of one 64x48 bucket, shared between tests: not to be changed."""
    return toy_bundle


class Built(dict[str, Path]):
    """Bundles of the smallest real networks by precision, made when they are asked for."""

    def __init__(self, small_bundle: Callable[..., Path]) -> None:
        super().__init__()
        self._make = small_bundle

    def __missing__(self, precision: str) -> Path:
        sizes = BUILT_SIZES if precision == "fp32" else BUILT_SIZES[:1]
        self[precision] = self._make(sizes=sizes, precision=precision)
        return self[precision]


@pytest.fixture(scope="session")
def built(small_bundle: Callable[..., Path]) -> Built:
    """float32 at two sizes."""
    pytest.importorskip("torch")
    return Built(small_bundle)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The checkpoint of `tests.support.fused_networks`."""
    pytest.importorskip("torch")
    from tests.support.fused_networks import write_checkpoint_files

    return write_checkpoint_files(tmp_path_factory.mktemp("networks"))


@pytest.fixture
def run_in_threads() -> Callable[[Callable[[int], object], int], list[object]]:
    """Calls a function once in each of n threads started together; its results in order."""

    def run(call: Callable[[int], object], threads: int) -> list[object]:
        barrier = threading.Barrier(threads)
        results: list[object] = [None] * threads

        def work(index: int) -> None:
            barrier.wait()
            try:
                results[index] = call(index)
            except BaseException as error:
                results[index] = error

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return results

    return run


@pytest.fixture
def gate() -> Gate:
    """A function that waits until it is opened."""
    return Gate()


@pytest.fixture
def make(gate: Gate) -> Iterator[Callable[..., Batcher]]:
    """Makes batchers around a gate or another function, and closes them at the end."""
    batchers: list[Batcher] = []

    def maker(run: Callable = gate, clock: Callable[[], float] = time.monotonic, **options: object) -> Batcher:
        def each(payloads: list) -> list:
            return [run(payload) for payload in payloads]

        batchers.append(Batcher(each, BatchOptions(**options), Metrics(), clock))
        return batchers[-1]

    yield maker
    gate.open()
    for batcher in batchers:
        batcher.close(drain=False)


@pytest.fixture
def started_threads() -> Callable[[], set[str]]:
    """Names of the library's threads that were started since the test began and run: not of other tests' estimators."""
    before = set(threading.enumerate())
    return lambda: {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("densegeo")}
