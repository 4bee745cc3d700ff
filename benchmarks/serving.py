"""The server under load, beside what is below it: `Estimator.submit` in the same way, and a bare handler around a call.

    python benchmarks/serving.py --bundle fe2e-tiny --seconds 60 --json serving.json --plot serving.svg

Every target runs in a process of its own but `submit`, which needs none. Rates are parts of what `submit` does when it
is saturated. Latencies are compared with a queue whose service time is that of one call, measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.open_loop import Ask, arrivals, open_loop, row, saturated
from densegeo.runtime import Estimator
from densegeo.runtime.images import load_image

PHOTO = Path(__file__).resolve().parent.parent / "densegeo" / "photographs" / "hall.jpg"
PARTS = (0.25, 0.5, 0.75, 0.9, 1.1)  # of the saturated rate
OUTSTANDING = 16
ROUNDS = 3  # of the saturated rates, one target after the other
IDLE_S = 2.0  # servers close connections that nobody uses
CALLS = 12  # that the service time is measured by, before and after
# Fixed beforehand: images per second, p99 at a fixed half rate, percentiles at a Poisson half rate.
BOUNDS = {"throughput": 0.95, "fixed_p99_to_call": 1.5, "poisson_to_queue": 1.15}


def request(pixels: np.ndarray) -> bytes:
    """An inference request in bytes, head and all."""
    size = {"binary_data_size": pixels.nbytes}
    tensor = {"name": "image", "shape": pixels.shape, "datatype": "UINT8", "parameters": size}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    head = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
    head += "Inference-Header-Content-Length: {header}\r\n\r\n"
    body = header + pixels.tobytes()
    return head.format(path="{path}", length=len(body), header=len(header)).encode() + body


class Connections:
    """Open connections that requests take and give back; a new one where all are in use."""

    def __init__(self, port: int, sent: bytes) -> None:
        self._port, self._sent = port, sent
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []  # since when

    async def ask(self) -> None:
        """One request; raises unless its answer is 200 and whole."""
        reader, writer = await self._connection()
        writer.write(self._sent)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        if not head.startswith(b"HTTP/1.1 200"):
            writer.close()
            raise RuntimeError(head[:200].decode())
        self._idle.append((reader, writer, time.monotonic()))

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, since = self._idle.pop()
            if time.monotonic() - since < IDLE_S:
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)

    def close(self) -> None:
        """All of them."""
        for _, writer, _ in self._idle:
            writer.close()


def submitting(estimator: Estimator, pixels: np.ndarray) -> Ask:
    """`Estimator.submit`, in a thread as the server does it."""

    async def ask() -> None:
        future = await asyncio.to_thread(estimator.submit, pixels)
        await asyncio.wrap_future(future)

    return ask


def bare(bundle: str) -> None:
    """The least that a server can be: pixels in, two arrays out, one call at a time. Prints its port."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from densegeo.serving.server import listen

    estimator, turn = Estimator(bundle), asyncio.Lock()
    shape = load_image(PHOTO).pixels.shape

    async def handle(request: Request) -> Response:
        body = await request.body()
        pixels = np.frombuffer(body[-int(np.prod(shape)) :], np.uint8).reshape(shape)
        async with turn:
            geometry = await run_in_threadpool(estimator, pixels)
        maps = [array.tobytes() for array in (geometry.prediction, geometry.normals) if array is not None]
        return Response(b"".join(maps), media_type="application/octet-stream")

    bound = listen("127.0.0.1", 0)
    bound.listen(2048)  # what connects before it answers waits
    print(
        json.dumps({"message": "serving", "url": f"http://127.0.0.1:{bound.getsockname()[1]}"}),
        file=sys.stderr,
        flush=True,
    )
    app = Starlette(routes=[Route("/", handle, methods=["POST"])])
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none")).run([bound])


@asynccontextmanager
async def process(*command: str) -> AsyncIterator[int]:
    """A server's port; it is told to end afterwards."""
    started = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    try:
        assert started.stderr is not None
        url = ""
        while not url:
            line = await asyncio.to_thread(started.stderr.readline)
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended with {started.wait()}")
            url = json.loads(line).get("url", "") if line.startswith("{") else ""
        drained = asyncio.create_task(asyncio.to_thread(started.stderr.read))  # its log must not fill the pipe
        yield int(url.rpartition(":")[2])
        started.terminate()
        await drained
    finally:
        started.kill()
        started.wait()


def call_ms(estimator: Estimator, pixels: np.ndarray) -> list[float]:
    """Milliseconds of calls one after the other."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        estimator(pixels)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def together(port: int) -> dict[str, float]:
    """Of the server's groups of queued images, how many had which size."""
    import httpx

    rows = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    counters = [line for line in rows if line.startswith("densegeo_groups_total{")]
    return {line.partition('images="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in counters}


async def measure(bundle: str, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """All targets, interleaved."""
    pixels = np.ascontiguousarray(load_image(PHOTO).pixels)
    sent = request(pixels)
    name = Path(bundle).name
    serve = ("-m", "densegeo", "serve", bundle, "--port", "0", "--max-queue", "4096", "--max-requests", "4096")
    with Estimator(bundle, max_queue=4096) as estimator:
        async with process(*serve) as port, process(__file__, "--bare", "--bundle", bundle) as bare_port:
            served = Connections(port, sent.replace(b"{path}", f"/v2/models/{name}/infer".encode(), 1))
            plain = Connections(bare_port, sent.replace(b"{path}", b"/", 1))
            targets = {"submit": submitting(estimator, pixels), "serve": served.ask, "bare": plain.ask}
            for ask in targets.values():
                await asyncio.gather(*(ask() for _ in range(OUTSTANDING)))
            calls = await asyncio.to_thread(call_ms, estimator, pixels)
            rates: dict[str, list[float]] = {target: [] for target in targets}
            for _ in range(ROUNDS):
                for target, ask in targets.items():
                    rates[target].append(await saturated(ask, OUTSTANDING, seconds / 4))
            say(f"saturated, images per second: { {target: round(max(rate), 2) for target, rate in rates.items()} }")
            calls += await asyncio.to_thread(call_ms, estimator, pixels)
            service = statistics.median(calls) / 1e3
            say(f"one call: {1e3 * service:.1f} ms")
            saturated_rate = statistics.median(rates["submit"])
            runs = []
            for kind in ("fixed", "poisson"):
                for part in PARTS:
                    due = arrivals(part * saturated_rate, seconds, kind)
                    for target, ask in targets.items():
                        result = row(await open_loop(ask, due), service)
                        runs.append(
                            {"target": target, "arrivals": kind, "part": part, "rate": part * saturated_rate} | result
                        )
                        say(f"{target:7} {kind:8} {part:4.2f}: {result['latency_ms']} failed {result['failed']}")
            groups = together(port)
            served.close()
            plain.close()
    return {"call_ms": 1e3 * service, "saturated": rates, "runs": runs, "images_together": groups}


def verdict(result: dict[str, Any]) -> dict[str, float]:
    """The figures that have bounds: see `BOUNDS`."""
    half = {run["arrivals"]: run for run in result["runs"] if run["target"] == "serve" and run["part"] == 0.5}
    by_target = {target: statistics.median(rates) for target, rates in result["saturated"].items()}
    return {
        "throughput": by_target["serve"] / by_target["submit"],
        "fixed_p99_to_call": half["fixed"]["latency_ms"]["p99"] / result["call_ms"],
        "poisson_to_queue": max(half["poisson"]["to_queue"].values()),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Latency percentiles against the rate, a panel for each kind of arrivals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("fixed", "poisson"), strict=True):
        for target, color in (("submit", "tab:blue"), ("serve", "tab:orange"), ("bare", "tab:grey")):
            runs = [run for run in result["runs"] if (run["target"], run["arrivals"]) == (target, kind)]
            for name, style in (("p50", "-"), ("p99", "--")):
                values = [run["latency_ms"].get(name, np.nan) for run in runs]
                axis.plot(
                    [run["rate"] for run in runs], values, style, color=color, marker="o", label=f"{target} {name}"
                )
        axis.axhline(result["call_ms"], color="black", linewidth=0.8, label="one call")
        axis.set(title=f"{kind} arrivals", xlabel="images per second asked for", yscale="log")
    axes[0].set_ylabel("milliseconds from the moment a request was due")
    axes[1].legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Measure, print, and end with 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="fe2e-tiny")
    parser.add_argument("--seconds", type=float, default=60.0, help="of every rate")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.bundle)
        return
    result = asyncio.run(measure(options.bundle, options.seconds, lambda text: print(text, file=sys.stderr)))
    figures = verdict(result)
    within_bounds = figures["throughput"] >= BOUNDS["throughput"] and all(
        figures[name] <= BOUNDS[name] for name in ("fixed_p99_to_call", "poisson_to_queue")
    )
    machine = environment(("onnxruntime", "starlette", "uvicorn", "h11", "numpy"))
    record = {"figures": figures, "bounds": BOUNDS, "threads": os.environ.get("OMP_NUM_THREADS"), **result, **machine}
    if options.json:
        write_json(options.json, record)
    if options.plot:
        draw(result, options.plot)
    print(json.dumps({"figures": figures, "bounds": BOUNDS, "good": within_bounds}))
    sys.exit(0 if within_bounds else 1)


if __name__ == "__main__":
    main()
