"""What a frame's way saves, backend by backend: networks one by one from the host against all of it on the device, and
one call after the other against two in flight.

The bundle's own first size; both ways are the ones that images take, and no time is given where they disagree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from densegeo.backends import BACKENDS, NETWORKS
from densegeo.benchmarks.latency import generated_image, image_flops
from densegeo.errors import BackendError, DensegeoError
from densegeo.runtime.backends import FrameBackend, open_backend
from densegeo.runtime.bundle import Manifest, read_manifest
from densegeo.runtime.images import load_image
from densegeo.runtime.request_metrics import StageTimings
from densegeo.runtime.verify import relative_error
from densegeo.runtime.ways import DeviceWay, HostWay, Job, Way

PEAK = 989e12  # FLOP/s of an H100 in bf16, dense (DESIGN section 6)
FACTOR = 2.0  # of a bundle's bound: each of two ways may be off by it once


def floor_ms(manifest: Manifest) -> float:
    """Of an image of a bundle's first size at an H100's peak in bf16."""
    return 1e3 * sum(image_flops(manifest.buckets[0], len(manifest.decode.outputs)).values()) / PEAK


def measure(bundle: Path, device: str, runs: int) -> dict[str, Any]:
    """Milliseconds of an image before and after, and what is saved as a share of the floor; by row."""
    manifest, rows = read_manifest(bundle), dict[str, Any]()
    for row in BACKENDS:
        if not row.available():
            continue
        try:
            backend = _opened(row.name, bundle, manifest, device)
        except DensegeoError as error:
            rows[row.name] = {"refused": str(error).partition("\n")[0][:200]}
            continue
        try:
            rows |= {f"{row.name}: {name}": timed for name, timed in _rows(backend, manifest, runs).items()}
        finally:
            backend.close()
    return rows


def _opened(name: str, bundle: Path, manifest: Manifest, device: str) -> FrameBackend:
    """Raises BackendError where images are not taken to this device whole."""
    if device == "cpu" and name == NETWORKS.name:  # to try the script
        from densegeo.runtime.backends.torch_modules import TorchBackend

        return TorchBackend(bundle, manifest, device, frames_on_cpu=True)
    backend = open_backend(name, bundle, manifest, device)
    if not (isinstance(backend, FrameBackend) and backend.takes_frames):
        backend.close()
        raise BackendError(f"images are prepared on the host for {name} on {backend.device}")
    backend.warm_up(1)
    return backend


def _rows(backend: FrameBackend, manifest: Manifest, runs: int) -> dict[str, Any]:
    image = generated_image(manifest.buckets[0])
    host, whole = (partial(_through, way, image) for way in (HostWay(backend, manifest), DeviceWay(backend, manifest)))
    device_maps, host_maps = whole().named(), host().named()
    for name, device_map in device_maps.items():
        off, bound = relative_error(device_map, host_maps[name]), FACTOR * manifest.verification.bounds[name]
        if not off <= bound:
            return {
                "on the device": {"failed": f"{name} is off by {off:.1e} from the host's, the bound is {bound:.1e}"}
            }
    alone = _milliseconds(whole, 1, runs)
    floor = floor_ms(manifest)
    pairs = {
        "on the device from pixels to maps": (_milliseconds(host, 1, runs), alone),
        "two calls in flight": (alone, _milliseconds(whole, 2, runs)),
    }
    return {
        name: {"before_ms": before, "after_ms": after, "saved_of_floor": (before - after) / floor}
        for name, (before, after) in pairs.items()
    }


def _through(way: Way, image: Any) -> Any:
    """An image's maps."""
    frame = load_image(image)
    bucket, array, placement = way.fit(frame)
    return way.run([Job(way, bucket, array, placement, StageTimings(), frame.color)])[0]


def _milliseconds(call: Callable[[], object], callers: int, runs: int) -> float:
    """Of one image, with so many callers at once, after a call of each."""
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda _: call(), range(2 * callers)))
        started = time.perf_counter()
        list(pool.map(lambda _: call(), range(2 * runs)))
        return 1e3 * (time.perf_counter() - started) / (2 * runs)
