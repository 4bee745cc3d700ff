"""`densegeo bench`: cold start, latency of each stage and end to end. Wrong numbers get no speed: it verifies first."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from densegeo.benchmarks.environment import environment
from densegeo.benchmarks.gpu_monitor import GpuMonitor, GpuReadings
from densegeo.benchmarks.other_load import OtherLoad
from densegeo.errors import BackendError
from densegeo.inspection import check_with_progress
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import STAGES, Bucket, Graph, read_manifest
from densegeo.runtime.images import load_image
from densegeo.runtime.measured import Conditions, Measured, measured, remember
from densegeo.runtime.resample import choose_bucket
from densegeo.runtime.verify import verify

WARM_UP = 3  # runs before timing starts
CALLERS = (1, 2, 4)  # threads that share the estimator, for the throughput

# Run in a fresh interpreter with the arguments bundle, backend, device and perhaps an image; prints milliseconds.
_COLD_START = """
import json, sys, time
times = [time.perf_counter()]
from densegeo.runtime import Estimator
times.append(time.perf_counter())
estimator = Estimator(*sys.argv[1:4])
times.append(time.perf_counter())
if len(sys.argv) > 4:
    source = sys.argv[4]
else:
    import numpy
    bucket = estimator.manifest.buckets[0]
    source = numpy.zeros((bucket.height, bucket.width, 3), dtype=numpy.uint8)
estimator(source)
times.append(time.perf_counter())
print(json.dumps({name: 1e3 * (b - a) for name, a, b in zip(("import", "open", "first"), times, times[1:])}))
"""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one stage over all timed runs, in milliseconds. jitter: mean change from one run to the next."""

    p50: float
    p90: float
    p99: float
    jitter: float
    mean: float
    variation: float  # standard deviation / mean
    gflops: float | None  # effective GFLOP/s at the median; None for stages that are not graphs


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark run, as its JSON line says it."""

    bundle: str  # the name of its directory
    model: str
    precision: str
    rewrites: list[str]
    bucket: str
    image_size: tuple[int, int]  # width, height
    backend: str
    device: str
    device_name: str  # of the GPU, or of the CPU
    conditions: Conditions  # of the timed runs
    cold_ms: dict[str, float]  # in a fresh process: import, open, first
    stages: dict[str, Spread]  # by stage, and "total"
    images_per_second: dict[str, float]  # by how many callers run at once
    batched_per_second: dict[str, float]  # images a second by how many run together; empty where none can
    memory_bytes: int | None  # most that this process held, the verification included
    gpu: GpuReadings | None  # during the timed runs
    gpu_note: str  # why there are none; empty where there are, and on a CPU
    ceiling_gflops: float  # of float32 matrix products in numpy on this CPU
    worst_error: float  # of the verification that came first
    error_bound: float
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    command: str


def run(bundle: Path, *, image: Path | None, runs: int, backend: str, device: str) -> tuple[Latency, Measured]:
    """Verify, then measure: all of it, and the record that is kept. Raises BackendError when the bundle's numbers come
    out wrong here.
    """
    manifest = read_manifest(bundle)
    check_with_progress(bundle, manifest)
    verdict = verify(bundle, backend, device)
    verdict.require_good(bundle, "No speed is reported: ")
    source: Path | NDArray[np.uint8] = image if image is not None else generated_image(manifest.buckets[0])
    size = load_image(source).size
    bucket = choose_bucket(manifest.buckets, size)
    cold = _cold_start(bundle, image, backend, device)
    with Estimator(bundle, backend, device, check_digests=False) as estimator:
        for _ in range(WARM_UP):
            estimator(source)
        with GpuMonitor(estimator.device) as monitor, OtherLoad() as others:
            samples = [dict(estimator(source).timings) for _ in range(runs)]
        throughput = {str(callers): _throughput(estimator, source, callers, runs) for callers in CALLERS}
        together = {str(count): _batched(estimator, source, count, runs) for count in _batches(estimator, bucket)}
        used_backend, used_device = estimator.backend, estimator.device
    stages = summarise(samples, bucket, len(manifest.decode.outputs))
    environment_fields = environment(
        ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt-rtx-cu13")
    )
    throttled = monitor.readings.throttled if monitor.readings is not None else None
    conditions = Conditions(
        runs=runs, variation=stages["total"].variation, others=others.share, throttled=throttled or []
    )
    total, name = stages["total"], device_name(used_device, environment_fields["machine"])
    record = measured(manifest, bucket, used_backend, name, total.p50, total.p90, conditions)
    remember(record)
    latency = Latency(
        bundle=bundle.resolve().name,
        model=manifest.model,
        precision=manifest.precision,
        rewrites=manifest.rewrites,
        bucket=bucket.name,
        image_size=size,
        backend=used_backend,
        device=used_device,
        device_name=name,
        conditions=conditions,
        cold_ms=cold,
        stages=stages,
        images_per_second=throughput,
        batched_per_second=together,
        memory_bytes=_peak_memory(),
        gpu=monitor.readings,
        gpu_note=monitor.note,
        ceiling_gflops=matmul_gflops(),
        worst_error=max(check.error for check in verdict.served),
        error_bound=max(check.bound for check in verdict.served),
        **environment_fields,
    )
    return latency, record


def device_name(device: str, machine: dict[str, Any]) -> str:
    """ "cuda:0" -> what the GPU is called, if that can be found out; anything else -> the CPU."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return str(machine["cpu"])
    names: list[str] = machine["gpus"]
    return names[int(index or 0)].partition(",")[0] if int(index or 0) < len(names) else device


def _throughput(estimator: Estimator, source: object, callers: int, runs: int) -> float:
    """Images a second with this many callers at once."""
    count = max(runs, 2 * callers)
    with ThreadPoolExecutor(callers) as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: estimator(source), range(count)))
        return count / (time.perf_counter() - started)


def _batches(estimator: Estimator, bucket: Bucket) -> list[int]:
    """How many images can run together besides 1: what the bundle has graphs for, or powers of two on a torch GPU."""
    built = sorted({other.batch for other in estimator.manifest.buckets if other.size == bucket.size} - {1})
    return built or [count for count in (2, 4, 8) if count <= estimator.images_together]


def _batched(estimator: Estimator, source: object, count: int, runs: int) -> float:
    """Images a second when `count` of them run together."""
    estimator.batch([source] * count)
    rounds = max(1, runs // count)
    started = time.perf_counter()
    for _ in range(rounds):
        estimator.batch([source] * count)
    return rounds * count / (time.perf_counter() - started)


def matmul_gflops(size: int = 1536, runs: int = 5) -> float:
    """The most float32 GFLOP/s seen in a square matrix product: what a fraction of the CPU's ceiling refers to."""
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    best = math.inf
    for _ in range(runs):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def generated_image(bucket: Bucket) -> NDArray[np.uint8]:
    """A seeded picture (H, W, 3) of a bucket's size; the network's time does not depend on what is in it."""
    return np.random.default_rng(0).integers(0, 256, (bucket.height, bucket.width, 3), dtype=np.uint8)


def summarise(samples: Sequence[dict[str, float]], bucket: Bucket, latents: int) -> dict[str, Spread]:
    """Percentiles of each stage of `samples` (stage -> ms), with effective GFLOP/s where the work is known.

    latents: decoded for an image.
    """
    work = image_flops(bucket, latents)
    work["total"] = sum(work.values())
    return {stage: _spread([sample[stage] for sample in samples], work.get(stage)) for stage in samples[0]}


def image_flops(bucket: Bucket, latents: int) -> dict[str, int]:
    """Floating-point operations of each stage for one image. latents: decoded for it."""
    work: dict[str, int] = {}
    for stage in STAGES:
        graph: Graph = getattr(bucket, stage)
        calls = latents // graph.inputs[0].shape[0] if stage == "decoder" else 1  # perhaps one by one
        work[stage] = calls * graph.flops
    return work


def _spread(values: list[float], flops: int | None) -> Spread:
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = (float(value) for value in np.percentile(array, (50, 90, 99)))
    mean = float(array.mean())
    variation = float(array.std(ddof=1)) / mean if array.size > 1 and mean > 0 else 0.0
    gflops = flops / (p50 * 1e6) if flops and p50 > 0 else None
    jitter = float(np.abs(np.diff(array)).mean()) if array.size > 1 else 0.0
    return Spread(p50=p50, p90=p90, p99=p99, jitter=jitter, mean=mean, variation=variation, gflops=gflops)


def _cold_start(bundle: Path, image: Path | None, backend: str, device: str) -> dict[str, float]:
    """Import, open and first image in a fresh process; the files are in the page cache already."""
    command = [sys.executable, "-c", _COLD_START, str(bundle), backend, device]
    command += [str(image)] if image is not None else []
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        times: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise BackendError(f"The cold start failed in a fresh process: {result.stderr.strip()[-500:]}") from error
    return times
