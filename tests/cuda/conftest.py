"""The stand-in driver, built once a run; the oldest cuda-core; bundles whose engines are engines in name alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.cuda import library
from tests.support.shared import Build, Once

LOWEST = Path(__file__).parent / "lowest.txt"
ROOT = Path(__file__).parents[2]
Child = Callable[..., "subprocess.CompletedProcess[str]"]


def unavailable(reason: str) -> None:
    """Skip, or fail in CI: there nothing may be left out silently."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def standin(once: Once) -> Path:
    """The folder of the stand-in's libcuda.so.1."""
    pytest.importorskip("cuda.core")
    if lacking := library.missing():
        unavailable(f"the stand-in driver cannot be built: {lacking}")
    return once("standin", library.build)


@pytest.fixture(scope="session")
def lowest(once: Once) -> Path:
    """A folder with the oldest cuda-core and cuda-bindings that pyproject.toml allows, to put first on the path."""

    def install(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, "-r", str(LOWEST)], capture_output=True, text=True, check=False)
        if done.returncode:
            (folder / "failed").write_text(done.stderr[-500:])

    folder = once("lowest-cuda-core", install)
    if (folder / "failed").exists():
        unavailable(f"{LOWEST.name} cannot be installed: {(folder / 'failed').read_text()}")
    return folder


@pytest.fixture(scope="session")
def child(standin: Path) -> Child:
    """Run Python with the stand-in as its driver; packages: a folder whose libraries come first."""

    def run(*arguments: object, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = [str(folder) for folder in (packages, ROOT) if folder is not None]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(standin),
            library.STANDIN: str(standin),
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=580
        )

    return run


@pytest.fixture(scope="session")
def with_engines(once: Once, batched_bundle: Build) -> Build:
    """(model, options) -> `batched_bundle`, with stand-in engines and our kernels for the stand-in driver's sm_89."""
    from densegeo.benchmarks.setups import FULL, SD2_VAE
    from densegeo.export.cubins import write_cubins
    from densegeo.kernels.contract import LaunchContract
    from densegeo.models.families import FE2E, FIFFDEPTH
    from densegeo.runtime.backends.tensorrt_kernels import launched
    from tests.cuda import bundles

    def compile_kernels(folder: Path) -> None:
        pairs = ((FE2E.decode(FULL.vae), 3), (FIFFDEPTH.decode(SD2_VAE), 1), (FIFFDEPTH.decode(SD2_VAE), 3))
        names = sorted({name for decode, channels in pairs for name in launched(decode, channels)})
        contracts = write_cubins(folder, (bundles.ARCHITECTURE,), names)
        (folder / "contracts.json").write_bytes(msgspec.json.encode(contracts))

    def build(model: str, **options: object) -> Path:
        bundle = batched_bundle(model, **options)
        cubins = once("standin-cubins", compile_kernels)
        contracts = msgspec.json.decode((cubins / "contracts.json").read_bytes(), type=list[LaunchContract])
        name = f"standin-{bundle.parent.name}"
        return once(name, lambda folder: bundles.with_engines(bundle, cubins, contracts, folder / "bundle")) / "bundle"

    return build
