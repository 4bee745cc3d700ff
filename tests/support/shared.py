"""What many tests need is made once in a run: the first worker that asks makes it, the others wait and share it.

Nothing here may be changed by a test: whoever damages a file copies it first.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

Once = Callable[[str, Callable[[Path], object]], Path]
Build = Callable[..., Path]
BATCHES = (2, 3)  # besides 1
BUILT_SIZES = ((48, 32), (64, 32))  # width, height; of the bundles that the runtime's tests run


@pytest.fixture(scope="session")
def shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Once:
    """(name, make) -> the folder that `make(folder)` filled."""

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, stamp = shared_folder / name, shared_folder / f"{name}.done"
        with (shared_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stamp.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a test that was cut off
                folder.mkdir()
                make(folder)
                stamp.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def graphs_once(shared_folder: Path) -> Iterator[Path]:
    """Builds in this process trace equal graphs once a run, and keep them in this folder."""
    from densegeo.export import graphs
    from tests.support.traced_graphs import remembering, sharing_operators

    folder = shared_folder / "graphs"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "export_graph", remembering(graphs.export_graph, folder))
        sharing_operators(patch)
        yield folder


@pytest.fixture(scope="session")
def build_once(once: Once, graphs_once: Path) -> Build:
    """The bundle of these `BuildOptions`, without `output`."""
    from densegeo.export.build import build_bundle
    from densegeo.export.build_options import BuildOptions

    def build(**options: Any) -> Path:
        build_options = BuildOptions(output=Path("bundle"), **options)
        key = hashlib.sha256(repr(build_options).encode()).hexdigest()[:12]

        def make(folder: Path) -> None:
            build_bundle(msgspec.structs.replace(build_options, output=folder / build_options.output))

        return once(f"{build_options.model}-{key}", make) / build_options.output

    return build


@pytest.fixture(scope="session")
def small_checkpoint(once: Once) -> Path:
    """The smallest FE2E checkpoint."""
    from tests.support.checkpoints import write_checkpoint

    return once("small", write_checkpoint) / "checkpoint"


@pytest.fixture(scope="session")
def small_bundle(build_once: Build, small_checkpoint: Path) -> Build:
    """The bundle of the smallest FE2E checkpoint with these options; float32 at 48x32 when there are none."""
    from tests.support.checkpoints import SIZE, small_source

    def build(**changes: Any) -> Path:
        return build_once(**({"model": "fe2e", "source": small_source(small_checkpoint), "sizes": (SIZE,)} | changes))

    return build


@pytest.fixture(scope="session")
def golden_bundle(build_once: Build, golden: Path) -> Build:
    """(lora, options) -> the bundle of `tests/golden`'s FE2E configuration, at its image's size."""
    from tests.support.checkpoints import SIZE, golden_source

    def build(*, lora: bool = True, **changes: Any) -> Path:
        inputs = golden_source(golden, lora=lora)
        return build_once(**({"model": "fe2e", "source": inputs, "sizes": (SIZE,)} | changes))

    return build


@pytest.fixture(scope="session")
def diffusers_files(once: Once) -> Callable[[Any], Path]:
    """A `diffusers_checkpoint.Case` -> its directory."""
    from tests.support.diffusers_checkpoint import write

    return lambda case: once(f"diffusers-{case.name}", lambda folder: write(folder / "files", case)) / "files"


@pytest.fixture(scope="session")
def fiffdepth_bundle(build_once: Build, diffusers_files: Callable[[Any], Path]) -> Build:
    """(case, options) -> the bundle of a `diffusers_checkpoint.Case` at its size."""
    from densegeo.export.sources import SourceOptions

    def build(case: Any, **changes: Any) -> Path:
        inputs = SourceOptions(checkpoint=str(diffusers_files(case)))
        return build_once(**({"model": "fiffdepth", "source": inputs, "sizes": (case.size,)} | changes))

    return build


@pytest.fixture(scope="session")
def batched_bundle(golden_bundle: Build, fiffdepth_bundle: Build) -> Build:
    """(model, options) -> a bundle of either model at 64x48 with graphs for two and for three images at once."""

    def build(model: str, **changes: Any) -> Path:
        if model == "fe2e":
            return golden_bundle(sizes=((64, 48),), batches=BATCHES, **changes)
        from tests.support.diffusers_checkpoint import CASES

        return fiffdepth_bundle(CASES[0], batches=BATCHES, **changes)

    return build
