"""An open-loop load generator: requests leave when their time has come, whether or not earlier ones have ended.

A latency counts from the moment at which its request was due, so a stalled server cannot slow down its own test.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ask = Callable[[], Awaitable[object]]
PERCENTILES = (50, 95, 99)


class Run(NamedTuple):
    """due, latencies: seconds, of each request; failed: how many; busy: the generator's own processor seconds."""

    due: NDArray[np.float64]
    latencies: NDArray[np.float64]
    failed: int
    seconds: float
    busy: float


def arrivals(rate: float, seconds: float, kind: str, seed: int = 0) -> NDArray[np.float64]:
    """When requests are due: "fixed" every 1 / rate seconds, or "poisson" at that mean rate."""
    count = max(2, round(rate * seconds))
    if kind == "fixed":
        return np.arange(count) / rate
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


async def open_loop(ask: Ask, due: NDArray[np.float64]) -> Run:
    """Ask at every due time."""
    latencies = np.full(len(due), np.nan)
    failures: list[Exception] = []
    start, busy = time.perf_counter() + 0.05, time.process_time()

    async def request(index: int) -> None:
        try:
            await ask()
        except Exception as error:
            failures.append(error)
        else:
            latencies[index] = time.perf_counter() - start - due[index]

    tasks = []
    for index, moment in enumerate(due):
        if (wait := start + moment - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(request(index)))
    await asyncio.gather(*tasks)
    return Run(due, latencies, len(failures), time.perf_counter() - start, time.process_time() - busy)


async def saturated(ask: Ask, outstanding: int, seconds: float) -> float:
    """Images per second with always so many requests on their way."""
    ended, stop = 0, time.perf_counter() + seconds

    async def work() -> None:
        nonlocal ended
        while time.perf_counter() < stop:
            await ask()
            ended += 1

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(outstanding)))
    return ended / (time.perf_counter() - start)


def queue(due: Sequence[float] | NDArray[np.float64], service: float) -> NDArray[np.float64]:
    """Latencies of the same arrivals at one server of a fixed service time (for Poisson arrivals: M/D/1)."""
    latencies, free = np.empty(len(due)), 0.0
    for index, moment in enumerate(due):
        free = max(free, float(moment)) + service
        latencies[index] = free - moment
    return latencies


def percentiles(latencies: NDArray[np.float64]) -> dict[str, float]:
    """Milliseconds; of those that were answered."""
    answered = latencies[np.isfinite(latencies)]
    return {f"p{part}": 1e3 * float(np.percentile(answered, part)) for part in PERCENTILES} if len(answered) else {}


def row(run: Run, service: float) -> dict[str, Any]:
    """What a run showed, beside the ideal queue."""
    actual, ideal = percentiles(run.latencies), percentiles(queue(run.due, service))
    return {
        "requests": len(run.due),
        "failed": run.failed,
        "latency_ms": actual,
        "queue_ms": ideal,
        "to_queue": {name: actual[name] / ideal[name] for name in actual},
        "generator_busy": run.busy / run.seconds,
    }
