"""Opening a backend of the table in `densegeo.backends`. A row's library is imported only when its row is used."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import require_text
from densegeo.backends import BACKENDS, BackendRow
from densegeo.colors import Color
from densegeo.errors import BackendError, ConfigError
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.outputs import Maps
from densegeo.runtime.backends.sharing import ALONE, Sharing, check_sharing
from densegeo.runtime.bundle import Bucket, Manifest, Stage
from densegeo.runtime.measured import fastest_first
from densegeo.runtime.resample import Placement
from densegeo.runtime.verified import has_failed, is_verified

log = logging.getLogger("densegeo")


class Backend(Protocol):
    """Runs the graphs of one bundle; safe to call from several threads."""

    name: str
    device: str  # "cpu" or "cuda:0"

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> NDArray[np.float32]:
        """Run one graph of a bucket on its only input; its only output as float32. Raises BackendError."""
        ...

    def close(self) -> None:
        """Release the graphs; a later `run` raises BackendError."""
        ...


@runtime_checkable
class FrameBackend(Backend, Protocol):
    """A backend that can take images as they are and resize on its device, so that little crosses the bus."""

    takes_frames: bool  # whether that is the faster way on its device
    records: bool  # whether the networks are replayed from a recording
    frames_at_once: int  # how many it can run together; more than that gain nothing or do not fit

    def warm_up(self, largest_group: int) -> None:
        """Load, allocate, compile and record what groups of up to `largest_group` images need, so that no request does.

        What does not fit is left out, with a line in the log, and `frames_at_once` is what fits. Raises BackendError.
        """
        ...

    def estimate(
        self,
        bucket: Bucket,
        pixels: Sequence[NDArray[np.uint8]],
        placements: Sequence[Placement],
        color: Color = "rgb",
    ) -> list[Maps[NDArray[np.float32]]]:
        """Pixels (h, w, 3), or YCbCr, of one or more images -> the maps of each, at its own size. Raises BackendError.

        color: how they all lie.
        """
        ...

    def keep(
        self, bucket: Bucket, image: Any, placement: Placement, color: Color, metres: Metres | None = None
    ) -> Maps[Any]:
        """The same for an array that may lie on the device, uint8 (h, w, 3) or YCbCr; the maps stay there.

        metres: depth by this line in place of the prediction, NaN where it is none.
        """
        ...


def open_backend(
    name: str,
    directory: Path,
    manifest: Manifest,
    device: str,
    threads: int | None = None,
    sharing: Sharing = ALONE,
    calls_at_once: int = 1,
) -> Backend:
    """Make the backend `name` for a bundle; "auto" takes the table's first one that can run it here.

    threads: of the CPU, that the networks may use; None leaves that to the library. calls_at_once: among how many calls
    they are shared, where the backend can be told. Where both are "auto" and NVIDIA's driver is here, any that runs on
    the GPU comes before all on the CPU; where there is no driver, what `densegeo bench` found fastest here for such a
    bundle comes first, unless `densegeo verify` failed with it. Raises ConfigError for an unknown name and for
    `sharing` where no GPU is used, BackendError when it is not installed or cannot run this bundle ("auto": when none
    can; the message names every reason) or where `device` is a GPU and NVIDIA's driver is missing.
    """
    require_text("backend", name, '"auto" or "onnxruntime"')
    require_text("device", device, '"auto", "cpu" or "cuda:0"')
    sharing = check_sharing(sharing)
    rows = [row for row in BACKENDS if name in ("auto", row.name)]
    if not rows:
        raise ConfigError(f"There is no backend {name!r}; choose auto, {', '.join(row.name for row in BACKENDS)}.")
    driver = has_cuda_driver()
    if device.partition(":")[0] == "cuda" and not driver and any("cuda" in row.devices for row in rows):
        raise BackendError(
            f"The device {device!r} needs an NVIDIA GPU, and no NVIDIA driver is here (libcuda.so.1 cannot be loaded). "
            'Use the device "cpu", or "auto", which takes what there is; `densegeo doctor` says what that is.'
        )
    beside_gpu = device == "auto" and driver
    timed = fastest_first(manifest) if name == "auto" and not driver else []
    timed = [backend for backend in timed if not has_failed(directory, backend)]
    rows.sort(key=lambda row: timed.index(row.name) if row.name in timed else len(timed))
    attempts = [(row, device) for row in rows]
    if name == "auto" and beside_gpu:
        attempts = [(row, kind) for kind in ("cuda", "cpu") for row in rows if kind in row.devices]
    reasons: dict[str, None] = {}  # in order, each once
    for row, place in attempts:
        if reason := _against(row, directory, manifest, name):
            reasons[f"{row.name}: {reason}"] = None
            continue
        try:
            backend = _opened(row, directory, manifest, place, threads, sharing, calls_at_once)
        except BackendError as error:
            if name != "auto":
                raise
            reasons[f"{row.name}: {error}"] = None
            continue
        if beside_gpu and backend.device == "cpu":
            _warn_of_cpu(directory, row, reasons)
        if row.name in timed:
            log.info("%s runs with %s, the fastest that `densegeo bench` measured here", directory, row.name)
        return backend
    raise BackendError("\n".join(["No backend can run this bundle here.", *reasons]))


def _opened(
    row: BackendRow,
    directory: Path,
    manifest: Manifest,
    device: str,
    threads: int | None,
    sharing: Sharing,
    calls_at_once: int,
) -> Backend:
    """The row's backend. Raises BackendError where it cannot run, ConfigError for `sharing` on a CPU."""
    module, _, function = row.opens.partition(":")
    options = {} if threads is None or "cpu" not in row.devices else {"threads": threads}
    options |= {"calls_at_once": calls_at_once} if row.shares_threads else {}
    backend: Backend = getattr(import_module(module), function)(directory, manifest, device, sharing, **options)
    if sharing != ALONE and backend.device == "cpu":
        backend.close()
        raise ConfigError(
            f"priority and memory_limit are for a GPU, and {row.name} runs on the CPU here: leave them out."
        )
    return backend


def _warn_of_cpu(directory: Path, row: BackendRow, reasons: Iterable[str]) -> None:
    """reasons: why other backends do not run on the GPU that is here."""
    log.warning(
        "%s runs on the CPU with %s, although an NVIDIA driver is here. `densegeo doctor` says what is missing, and "
        'device="cpu" that it is meant.%s',
        directory,
        row.name,
        "".join(f"\n{reason}" for reason in reasons),
    )


def _against(row: BackendRow, directory: Path, manifest: Manifest, name: str) -> str | None:
    """Why the row is not even tried where `name` was asked for, or None."""
    if not row.available():
        return f"not installed; {row.install}"
    if name == "auto" and row.runs == "engines" and not manifest.engines:
        return f"the bundle has no engines; `densegeo engines {directory}` makes some"
    if name == "auto" and row.verified_only and not is_verified(directory, row.name):
        return f"not verified on this machine; `densegeo verify {directory} --backend {row.name}`"
    return None


def parse_device(device: str) -> tuple[str, str]:
    """ "auto", "cpu", "cuda" or "cuda:N" -> (kind, index or ""); raises ConfigError for anything else."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise ConfigError(f'device must be "auto", "cpu", "cuda" or "cuda:0", not {device!r}.')
    return kind, index


def require_device(image_device: str, estimator_device: str) -> None:
    """Raises BackendError for memory of another CUDA device: what crosses the bus is to be the caller's choice."""
    if image_device != estimator_device:
        raise BackendError(
            f"The image lies on {image_device}, and this estimator runs on {estimator_device}: move the image, or "
            f'open the estimator with device="{image_device}".'
        )


def has_cuda_driver() -> bool:
    """Whether NVIDIA's driver library loads: GPU builds of libraries also install without one."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False
