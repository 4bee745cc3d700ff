"""What `densegeo bench` does with bundles and backends: times each pair, tells people, keeps JSON when asked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.benchmarks.compare import print_comparison
from densegeo.benchmarks.gpu_monitor import GpuReadings, Reading
from densegeo.benchmarks.latency import Latency, run
from densegeo.errors import BackendError, ResourceError
from densegeo.files import atomic_write
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.measured import Measured, advice


def bench(
    bundles: Sequence[Path],
    *,
    image: Path | None,
    runs: int,
    backends: Sequence[str],
    device: str,
    json_file: Path | None,
) -> None:
    """Time every bundle with every backend, and compare several.

    Of several, one that cannot run, or whose numbers come out wrong, is said so, and the others go on. Raises
    BackendError for it at the end, ThrottledError for a comparison of throttled runs, and ResourceError.
    """
    console, results, records, failed = Console(), list[Latency](), list[Measured](), list[str]()
    pairs = list(product(bundles, backends))
    for bundle in bundles:
        read_manifest(bundle)  # the last one's path is wrong? Say so now, not after hours
    for bundle, backend in pairs:
        try:
            result, record = run(bundle, image=image, runs=runs, backend=backend, device=device)
        except BackendError as error:
            if len(pairs) == 1:
                raise
            failed.append(f"{bundle.name} with {backend}")
            console.print(f"[yellow]{escape(failed[-1])} is left out:[/] {escape(str(error))}\n", soft_wrap=True)
            continue
        results.append(result)
        records.append(record)
        print_latency(result, console)
        if json_file is not None:
            write_results(json_file, results)
    if len(results) > 1:
        names = [result.bundle for result in results]
        print_comparison(list(zip(names, results, strict=True)), console)
    for line in dict.fromkeys(line for bundle in bundles for line in advice(read_manifest(bundle), records)):
        console.print(line, soft_wrap=True)
    if failed:
        raise BackendError(f"{len(failed)} of {len(pairs)} were not timed: {'; '.join(failed)}")


def write_results(path: Path, results: Sequence[Latency]) -> None:
    """One line a run; a reader never sees half a file. Raises ResourceError."""
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(b"".join(msgspec.json.encode(result) + b"\n" for result in results))
    except OSError as error:
        raise ResourceError(f"Cannot write {path}: {error.strerror}.") from error


def print_latency(result: Latency, console: Console) -> None:
    """What was timed, each stage, and why not to believe it."""
    width, height = result.image_size
    cold = ", ".join(f"{name} {value:.0f} ms" for name, value in result.cold_ms.items())
    for line in (
        f"{result.bundle}: {result.model} {result.precision}, image {width}x{height}, bucket {result.bucket}, "
        f"{result.backend} on {result.device} ({result.device_name}), {result.conditions.runs} runs",
        f"verified first: worst relative error {result.worst_error:.1e}, bound {result.error_bound:.0e}",
        f"cold start in a fresh process: {cold}",
    ):
        console.print(line, soft_wrap=True)
    console.print(_stages(result))
    console.print(f"images/s by callers at once: {_speeds(result.images_per_second)}", soft_wrap=True)
    if result.batched_per_second:
        console.print(f"images/s by images run together: {_speeds(result.batched_per_second)}", soft_wrap=True)
    total = result.stages["total"].gflops
    if total is not None and result.device == "cpu":
        share = 100 * total / result.ceiling_gflops
        console.print(f"{share:.0f} % of this CPU's {result.ceiling_gflops:.0f} GFLOP/s in float32 matrix products")
    if result.gpu is not None:
        console.print(f"GPU meanwhile: {gpu_in_words(result.gpu)}", soft_wrap=True)
    if result.gpu_note:
        console.print(f"[yellow]{result.gpu_note}[/]", soft_wrap=True)
    for doubt in result.conditions.doubts:
        console.print(f"[yellow]warning:[/] {doubt}; no build will be recommended by this", soft_wrap=True)
    console.print()


def _stages(result: Latency) -> Table:
    table = Table(show_edge=False)
    for column in ("stage", "p50 ms", "p90 ms", "p99 ms", "jitter", "variation", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, spread in result.stages.items():
        speed = f"{spread.gflops:.1f}" if spread.gflops is not None else "-"
        times = (f"{value:.2f}" for value in (spread.p50, spread.p90, spread.p99, spread.jitter))
        table.add_row(stage, *times, f"{100 * spread.variation:.1f} %", speed)
    return table


def _speeds(by_count: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} with {count}" for count, value in by_count.items())


def gpu_in_words(gpu: GpuReadings) -> str:
    """ "310 W (280 to 350), 1755 MHz (1700 to 1980), 66 °C at most, not throttled"."""

    def in_words(reading: Reading | None, unit: str) -> str:
        if reading is None:
            return f"{unit} unknown"
        return f"{reading.mean:.0f} {unit} ({reading.least:.0f} to {reading.most:.0f})"

    words = [in_words(gpu.watts, "W"), in_words(gpu.sm_mhz, "MHz")]
    words.append("temperature unknown" if gpu.celsius is None else f"{gpu.celsius.most:.0f} °C at most")
    if gpu.memory_bytes is not None:
        words.append(f"{gpu.memory_bytes / 2**30:.1f} GiB in use")
    if gpu.throttled is None:
        words.append("throttling unknown")
    else:
        words.append(f"THROTTLED: {', '.join(gpu.throttled)}" if gpu.throttled else "not throttled")
    if gpu.power_limited:
        words.append(f"at its power limit {100 * gpu.power_limited:.0f} % of the time")
    return ", ".join(words)
