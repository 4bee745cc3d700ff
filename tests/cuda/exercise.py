"""Everything that the tensorrt backend does for images, over the stand-in driver, against ONNX Runtime on the host."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from densegeo.runtime import Estimator, Geometry
from densegeo.runtime.backends import cuda_weights, tensorrt_engines
from densegeo.runtime.backends.cuda_memory import Memory
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.tensorfile import read_tensors
from densegeo.runtime.verify import relative_error, run_stages, verify, within
from tests.cuda.bundles import ARCHITECTURE
from tests.cuda.engine_double import StandInTensorRT
from tests.cuda.foreign import Image, InterfaceImage, Reading
from tests.cuda.kernel_references import References
from tests.cuda.standin import Driver
from tests.cuda.twin import float32_bundle

BOUND = 1e-5  # relative L2 norm, float32
DEVICE = 1  # the backend's; device 0 is the caller's current one, so whoever forgets to choose is found out
WEIGHTS_AT_A_TIME = 1 << 14  # bytes, so that small weights too pass through their two buffers in turns
# width, height: odd, larger and smaller than buckets, portrait
SIZES = ((187, 131), (90, 60), (85, 67), (61, 96), (75, 81))


@dataclass
class Outcome:
    """What a run says."""

    failures: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    misaligned: int = 0
    worst_error: float = 0.0
    launches: int = 0


# What `Estimator.tensors` takes: (another library's memory, pixels) -> an image.
FORMS: tuple[Callable[[Memory, NDArray[np.uint8]], Any], ...] = (
    Image,
    lambda memory, pixels: InterfaceImage(Image(memory, pixels), named=True),
    lambda memory, pixels: InterfaceImage(Image(memory, pixels), named=False),
    lambda memory, pixels: pixels,
    lambda memory, pixels: torch.from_numpy(pixels),
)


@dataclass
class Setup:
    """A bundle set up over the driver: its stand-in library, its kernels, and what the images should give."""

    driver: Driver
    bundle: Path
    library: StandInTensorRT
    references: References
    images: list[NDArray[np.uint8]]
    wanted: list[Geometry]


@contextmanager
def staged(bundle: Path) -> Iterator[Setup]:
    """Put the stand-ins in place, and compute what a bundle should give."""
    driver = Driver()
    manifest = read_manifest(bundle)
    contracts = [contract for contract in manifest.kernels if contract.architecture == ARCHITECTURE]
    cuda_weights.STAGING = WEIGHTS_AT_A_TIME
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {f"XDG_{kind}_HOME": str(Path(folder) / kind) for kind in ("CACHE", "STATE")}
        graphs = float32_bundle(bundle, manifest, Path(folder))
        library = StandInTensorRT(driver, bundle, manifest, graphs)
        references = References(driver, bundle, contracts)
        driver.on_kernel(references.run)
        load: Any = lambda manifest, architecture: (manifest.engines[0].library, library)  # noqa: E731
        tensorrt_engines.load_library = load
        random = np.random.default_rng(0)
        images = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES]
        with Estimator(graphs, "onnxruntime", "cpu", check_digests=False) as estimator:
            expected = [estimator(image) for image in images]
        yield Setup(driver, bundle, library, references, images, expected)


class Warnings(logging.Handler):
    """Every warning is a failure here: something runs other than it should."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        self._failures.append(record.getMessage())


def exercise(setup: Setup, schedule: str) -> Outcome:
    """One run of all checks."""
    outcome = Outcome()
    setup.driver.schedule(schedule)
    setup.library.misaligned.clear()
    setup.references.launches.clear()
    warnings = Warnings(outcome.failures)
    logging.getLogger("densegeo").addHandler(warnings)
    try:
        Checks(setup, outcome, schedule).run()
    except Exception as error:
        outcome.failures.append(f"{type(error).__name__}: {error}")
    finally:
        logging.getLogger("densegeo").removeHandler(warnings)
    outcome.failures += setup.driver.failures
    outcome.problems += setup.driver.problems
    if setup.driver.captures:
        outcome.problems.append(f"{setup.driver.captures} streams are still recorded")
    outcome.misaligned = len(setup.library.misaligned)
    outcome.launches = len(setup.references.launches)
    return outcome


class Checks:
    """What an estimator is used for, in order."""

    def __init__(self, setup: Setup, outcome: Outcome, schedule: str) -> None:
        self._setup, self._outcome, self._schedule = setup, outcome, schedule

    def run(self) -> None:
        from cuda.core import Device

        Device(0).set_current()
        with Estimator(self._setup.bundle, "tensorrt", f"cuda:{DEVICE}", check_digests=False) as estimator:
            self._one_by_one(estimator)
            self._together(estimator)
            self._from_threads(estimator)
            self._beside_each_other(estimator)
            self._on_the_device(estimator)
            if Device().device_id != 0:
                self._outcome.failures.append("the caller's current device was changed")
        self._verified()

    def _one_by_one(self, estimator: Estimator) -> None:
        for _ in range(2):
            self._compare("one by one", [estimator(image) for image in self._setup.images])

    def _together(self, estimator: Estimator) -> None:
        self._compare("batch", estimator.batch(self._setup.images))

    def _from_threads(self, estimator: Estimator) -> None:
        images = self._setup.images
        with ThreadPoolExecutor(4) as pool:
            self._compare("threads", list(pool.map(estimator, images)))
        futures = [estimator.submit(image) for image in images]
        self._compare("submit", [future.result(60) for future in futures])

    def _beside_each_other(self, estimator: Estimator) -> None:
        """Where work is done when it is waited for, its order can be seen."""
        from tests.cuda import overlap

        if self._schedule != "lazy":
            return
        for run in (overlap.copies_in_run_under_networks, overlap.copies_back_run_under_networks):
            try:
                self._compare(run.__name__, run(self._setup, estimator))
            except Exception as error:
                self._outcome.failures.append(f"{run.__name__}: {type(error).__name__}: {error}")

    def _on_the_device(self, estimator: Estimator) -> None:
        """Images come from another library's stream, which reads the results too, while the next images are run."""
        from cuda.core import Device

        self._foreign = foreign = Memory(Device(DEVICE))  # it outlives what reads on its stream
        for index, (pixels, expected) in enumerate(zip(self._setup.images, self._expected(), strict=True)):
            given = FORMS[index % len(FORMS)](foreign, pixels)
            results = [result for result in estimator.tensors(given) if result is not None]
            readings = [Reading(foreign, results.pop(0)) for _ in expected]
            estimator(np.ascontiguousarray(pixels[::-1, ::-1]))  # takes what memory there is, for other numbers
            for reading, want in zip(readings, expected, strict=True):
                self._error(f"tensors {index}", reading.wait(), want)
        self._in_metres(estimator, foreign)

    def _in_metres(self, estimator: Estimator, foreign: Memory) -> None:
        """Depth by a line, on the device."""
        pixels, expected = self._setup.images[0], self._setup.wanted[0]
        metres, _ = estimator.tensors(pixels, scale=2.0, shift=1.0)
        self._error("metres", Reading(foreign, metres).wait(), expected.to_metric(scale=2.0, shift=1.0).depth)

    def _expected(self) -> list[list[NDArray[np.float32]]]:
        """What every image gives."""
        return [_maps(geometry) for geometry in self._setup.wanted]

    def _verified(self) -> None:
        """Stored pictures as `densegeo verify` sends them, and stored inputs through single engines."""
        bundle, device = self._setup.bundle, f"cuda:{DEVICE}"
        wrong = verify(bundle, "tensorrt", device).wrong
        with Estimator(bundle, "tensorrt", device, check_digests=False) as estimator:
            path = bundle / estimator.manifest.verification.inputs
            stages = run_stages(estimator, read_tensors(path), path)
        wrong += [check for check in stages if not within(check)]
        self._outcome.failures += [f"verify: {check}" for check in wrong]

    def _compare(self, name: str, results: list[Geometry]) -> None:
        for geometry, expected in zip(results, self._expected()[: len(results)], strict=True):
            for array, want in zip(_maps(geometry), expected, strict=True):
                self._error(name, array, want)

    def _error(self, name: str, result: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
        error = relative_error(result, wanted)
        self._outcome.worst_error = max(self._outcome.worst_error, error)
        if not error <= BOUND:
            self._outcome.failures.append(f"{name}: relative error {error:.2e}")


def _maps(geometry: Geometry) -> list[NDArray[np.float32]]:
    """The prediction and the normals, as far as there are any."""
    return [array for array in (geometry.prediction, geometry.normals) if array is not None]
