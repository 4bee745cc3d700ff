"""Everything a GPU should prove, in one run of at most nine minutes: `python benchmarks/gpu_check.py --output FILE`.

It needs torch, Triton, numpy, safetensors and msgspec, pytest for the tests, and for `--bundle` what its backends need
(tensorrt or tensorrt_rtx and cuda-core for engines; those not installed are passed over). The file is written anew
after every step, so that a run that is cut off leaves what it measured; a step that fails says so there and does not
stop the rest.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a bare machine has the checkout and no installation

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from densegeo.backends import BACKENDS, ENGINES  # noqa: E402
from densegeo.benchmarks import gpu_fiffdepth, gpu_frames, gpu_launches, gpu_models, gpu_rows  # noqa: E402
from densegeo.benchmarks.environment import environment, write_json  # noqa: E402
from densegeo.benchmarks.gpu_kernels import bandwidths, median_seconds  # noqa: E402
from densegeo.errors import DensegeoError  # noqa: E402
from densegeo.files import require_writable  # noqa: E402
from densegeo.runtime import Estimator  # noqa: E402
from densegeo.runtime.backends.torch_device import DeviceNetwork  # noqa: E402
from densegeo.runtime.backends.torch_transfer import Ring  # noqa: E402
from densegeo.runtime.bundle import Manifest, read_manifest, require_bundle  # noqa: E402
from densegeo.runtime.ready import find_bundle  # noqa: E402
from densegeo.runtime.resample import Placement, whole  # noqa: E402
from densegeo.runtime.verify import verify  # noqa: E402
from densegeo.size import Size  # noqa: E402

BUDGET_S, QUICK_S = 540.0, 220.0
TESTS = ("tests/kernels", "tests/runtime/test_torch_device.py", "tests/runtime/test_torch_fused.py")
SIZES = (Size(864, 576), Size(1024, 768))  # DESIGN section 6 has the floors of these
Step = Callable[["Check"], dict[str, Any]]


class Check:
    """One run: its device, the time it has left, and what it found so far."""

    def __init__(
        self, output: Path, device: str, bundle: Path, budget: float, *, small: bool = False, quick: bool = False
    ) -> None:
        self.output, self.device, self.bundle, self.small, self.quick = output, device, bundle, small, quick
        self._end = time.monotonic() + budget
        self.weights: gpu_models.Weights | None = None
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
            "small": small,
            "quick": quick,
            **environment(("torch", "triton", "numpy", "safetensors", "msgspec")),
            "steps": {},
        }

    def seconds_left(self) -> float:
        """Seconds of the budget that are left."""
        return self._end - time.monotonic()

    def runs(self, count: int) -> int:
        """How often something is timed: once where the script itself is tried."""
        return 1 if self.small else count

    def run(self, steps: dict[str, Step]) -> bool:
        """Run the steps in order, write the file after each, and return whether all went well."""
        all_well = True
        for name, step in steps.items():
            started = time.monotonic()
            if self.seconds_left() < 30:
                entry: dict[str, Any] = {"skipped": "no time left"}
            else:
                try:
                    entry = step(self)
                except Exception as error:
                    traceback.print_exc()
                    entry = {"failed": f"{type(error).__name__}: {error}"}
            entry["seconds"] = round(time.monotonic() - started, 1)
            gpu_models.free(self.device)
            all_well &= "failed" not in entry
            self.result["steps"][name] = entry
            write_json(self.output, self.result)
            verdict = "failed" if "failed" in entry else "skipped" if "skipped" in entry else "done"
            print(f"{name}: {verdict} in {entry['seconds']} s", flush=True)
        return all_well


def tests(check: Check) -> dict[str, Any]:
    """The gpu-marked tests, in a process of their own."""
    which = "gpu" if check.device != "cpu" else "not gpu"
    command = [sys.executable, "-m", "pytest", "--tb=short", "--show-capture=no", "-m", which, *TESTS]
    if find_spec("xdist"):  # most of the time goes into compiling kernels, on the CPU
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(30.0, check.seconds_left() / 2)
    )
    check.output.with_suffix(".tests.txt").write_text(process.stdout)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", process.stdout)}
    entry: dict[str, Any] = {"command": " ".join(command[1:]), **counts, "tail": process.stdout[-3000:]}
    if process.returncode or not counts.get("passed"):
        entry["failed"] = f"exit code {process.returncode}"
    return entry


def kernels(check: Check) -> dict[str, Any]:
    """Bandwidth of every memory-bound kernel."""
    return bandwidths(check.device, small=check.small, runs=check.runs(20))


def rows(check: Check) -> dict[str, Any]:
    """Every change of the hot path on and off, of FE2E's networks and of the bundle's way through each backend; no time
    for one whose numbers are off.
    """
    measured_rows = gpu_rows.measure(check.device, small=check.small, runs=check.runs(10))
    frames = gpu_frames.measure(check.bundle, check.device, check.runs(10))
    manifest = read_manifest(check.bundle)
    title, floor = f"an image of {manifest.model} at {manifest.buckets[0].size}", gpu_frames.floor_ms(manifest)
    print(gpu_rows.table(measured_rows), gpu_rows.table(frames, title, floor), sep="\n\n", flush=True)
    wrong = [f"{name}: {row['failed']}" for name, row in (measured_rows | frames).items() if "failed" in row]
    entry = {"floor_ms": gpu_rows.FLOOR_MS, "rows": measured_rows, "frames_floor_ms": floor, "frames": frames}
    return entry | ({"failed": "; ".join(wrong)} if wrong else {})


def launches(check: Check) -> dict[str, Any]:
    """The tensorrt backend's kernels, copies and recording, without torch's or Triton's launcher."""
    if check.device == "cpu":
        return {"skipped": "it needs a GPU"}
    return gpu_launches.launches(check.device)


def numbers(check: Check) -> dict[str, Any]:
    """Ours against plain low precision, both against float32, on a model small enough for that."""
    errors = gpu_models.errors(check.device, check.small)
    wrong = [
        name
        for name, row in {"bf16": errors, **{f"fp8, {name}": row for name, row in errors["fp8"].items()}}.items()
        if not row["ours"] <= gpu_models.ERROR_FACTOR * row["plain"]
    ]
    limit = gpu_models.ERROR_FACTOR * errors["plain"]
    return {**errors, "limit": limit} | ({"failed": f"ours is off: {', '.join(wrong)}"} if wrong else {})


def models(check: Check) -> dict[str, Any]:
    """Full-size FE2E at both sizes; no speed when the numbers were wrong."""
    if "failed" in check.result["steps"]["numbers"]:
        raise RuntimeError("the numbers are wrong, so no speed is measured")
    weights = _weights(check)
    sizes = SIZES if not check.small else (Size(64, 48),)
    comparisons = [gpu_models.Comparison(weights, size, check.runs(7), check.seconds_left) for size in sizes]
    for compiled in (False,) if check.quick else (False, True):
        for comparison in comparisons:
            comparison.measure(compiled=compiled)
    return {"sizes": [comparison.report() for comparison in comparisons]}


def fiffdepth(check: Check) -> dict[str, Any]:
    """Full-size FiffDepth at 512x512."""
    comparison = gpu_fiffdepth.compare(
        check.device, check.small, check.runs(15), check.seconds_left, compiled=not check.quick
    )
    wrong = [name for name, row in comparison["contenders"].items() if "failed" in row]
    return comparison | ({"failed": f"out of bounds: {', '.join(wrong)}"} if wrong else {})


def transfers(check: Check) -> dict[str, Any]:
    """Milliseconds an image, end to end: one image at a time against two in flight; pinned against pageable copies."""
    size = Size(64, 48) if check.small else SIZES[0]
    network = gpu_models.device_network(_weights(check), size, True)
    pixels = _pixels(size)
    placement = whole(size)
    ring, count = Ring(check.device), check.runs(8)

    def estimate(_: int) -> object:
        return ring.run([pixels], lambda frames: network(frames, [placement]))

    def pageable() -> None:
        (maps,) = network([torch.from_numpy(pixels).to(check.device)], [placement])
        for tensor in maps.named().values():
            tensor.cpu()

    entry: dict[str, Any] = {"captured": network.recorded(1).captured, "images": count}
    for name, workers in (("one in flight", 1), ("two in flight", 2)):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(estimate, range(check.runs(2))))
            started = time.perf_counter()
            list(pool.map(estimate, range(count)))
            entry[name] = 1e3 * (time.perf_counter() - started) / count
    entry["pageable"] = 1e3 * median_seconds(pageable, check.device, check.runs(5))
    for group in (2, 4):
        entry[f"batch of {group}"] = _batched(ring, network, [pixels] * group, placement, check.runs(5))
    return entry


def _pixels(size: Size) -> NDArray[np.uint8]:
    """A seeded picture."""
    return np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)


def _batched(
    ring: Ring, network: DeviceNetwork, pixels: list[NDArray[np.uint8]], placement: Placement, runs: int
) -> Any:
    """Milliseconds an image when this many are run at once, or why not."""

    def together() -> None:
        ring.run(pixels, lambda frames: network(frames, [placement] * len(pixels)))

    try:
        together()  # records
        seconds = median_seconds(together, ring.device, runs)
    except torch.OutOfMemoryError as error:
        return {"failed": str(error)[:300]}
    return {"ms": 1e3 * seconds / len(pixels), "captured": network.recorded(len(pixels)).captured}


def profile(check: Check) -> dict[str, Any]:
    """Every GPU kernel of one image of FE2E and of FiffDepth, by total time."""
    size, side = (Size(64, 48), 64) if check.small else (SIZES[0], gpu_fiffdepth.SIDE)
    entry = {}
    for name, size_of, make in (
        ("fe2e", size, lambda: gpu_models.device_network(_weights(check), size, True)),
        ("fiffdepth", Size(side, side), lambda: gpu_fiffdepth.ours(check.device, check.small)),
    ):
        entry[name] = _kernels(make(), size_of, check.device)
        gpu_models.free(check.device)
    return entry


def _weights(check: Check) -> gpu_models.Weights:
    """FE2E's, made once a run."""
    if check.weights is None:
        check.weights = gpu_models.make_weights(check.small, check.device)
    return check.weights


def _kernels(network: DeviceNetwork, size: Size, device: str) -> dict[str, Any]:
    on_gpu = device != "cpu"
    pixels = torch.zeros(size.height, size.width, 3, dtype=torch.uint8, device=device)
    placement = whole(size)
    network([pixels], [placement])
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as recorded:
        network([pixels], [placement])
        if on_gpu:
            torch.cuda.synchronize()
    rows = [
        {
            "name": event.key[:160],
            "calls": event.count,
            "us": event.self_device_time_total if on_gpu else event.self_cpu_time_total,
        }
        for event in recorded.key_averages()
    ]
    rows = sorted((row for row in rows if row["us"] > 0), key=lambda row: -float(row["us"]))
    return {"captured": network.recorded(1).captured, "kernels": rows[:120]}


def bundles(check: Check) -> dict[str, Any]:
    """The bundle through every backend that is here: errors against the stored float32 outputs, and latency."""
    manifest = read_manifest(check.bundle)
    entry: dict[str, Any] = {"model": manifest.model, "precision": manifest.precision, "backends": {}}
    for row in BACKENDS:
        result = _backend(check, check.bundle, manifest, row.name) if row.available() else {"skipped": row.install}
        entry["backends"][row.name] = result
        if "failed" in result:
            entry["failed"] = f"{row.name}: {result['failed']}"
    return entry


def _backend(check: Check, bundle: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """One backend: its log lines (graphs that run eager say so), its errors, and if they are in bounds its speed."""
    lines = _Lines()
    logging.getLogger("densegeo").addHandler(lines)
    try:
        verdict = verify(bundle, name, check.device)
        entry: dict[str, Any] = {
            "log": lines.seen,
            "bounds": manifest.verification.bounds,
            "errors": {f"{row.bucket} {row.output}, {row.reference}": row.error for row in verdict.served},
        }
        if not verdict.good:
            names = dict.fromkeys(row.output for row in verdict.wrong)
            return {**entry, "failed": f"out of bounds: {', '.join(names)}"}
        image = _pixels(manifest.buckets[0].size)
        with Estimator(bundle, name, check.device, check_digests=False) as estimator:
            runs = check.runs(7)
            for count in (1, 4, 8):
                estimator.batch([image] * count)
                seconds = median_seconds(partial(estimator.batch, [image] * count), "cpu", runs)
                entry[f"ms an image, {count} at once"] = 1e3 * seconds / count
        return entry
    except DensegeoError as error:
        needed = name == ENGINES.name and manifest.engines
        return {"failed" if needed else "refused": str(error)[:500], "log": lines.seen}
    finally:
        logging.getLogger("densegeo").removeHandler(lines)


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


STEPS: dict[str, Step] = {
    "launches": launches,
    "bundles": bundles,
    "numbers": numbers,
    "kernels": kernels,
    "fiffdepth": fiffdepth,
    "models": models,
    "transfers": transfers,
    "profile": profile,
    "tests": tests,
    "rows": rows,
}
QUICK = ("launches", "bundles", "numbers", "kernels", "fiffdepth", "models", "rows")


def main() -> int:
    """The command; returns 1 when a step failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/gpu_check.json"), help="the JSON file to write")
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="only these, in this order")
    parser.add_argument("--quick", action="store_true", help="under four minutes: nothing that torch compiles")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--device", default="cuda:0", help='"cpu" tries the script where there is no GPU')
    parser.add_argument(
        "--budget", type=float, help=f"seconds it may take ({BUDGET_S:.0f}; {QUICK_S:.0f} with --quick)"
    )
    parser.add_argument(
        "--bundle",
        type=find_bundle,
        default="fe2e-tiny",
        help="verified with every backend here (default: %(default)s)",
    )
    options = parser.parse_args()
    try:
        require_bundle(options.bundle)
        require_writable(options.output)
    except (DensegeoError, OSError) as error:
        parser.error(str(error))
    if options.device != "cpu" and not torch.cuda.is_available():
        print("There is no CUDA device that torch can use: nothing was measured.", file=sys.stderr)
        return 2
    budget = options.budget or (QUICK_S if options.quick else BUDGET_S)
    check = Check(options.output, options.device, options.bundle, budget, small=options.small, quick=options.quick)
    all_well = check.run({name: STEPS[name] for name in options.steps or (QUICK if options.quick else STEPS)})
    print(f"wrote {options.output}")
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
