"""A checkpoint for one test."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from densegeo.runtime.bundle import FileDigest, read_manifest, write_manifest
from tests.support.absent import BUILD_SIDE, run_without
from tests.support.shared import Build, Once


@pytest.fixture(autouse=True)
def graphs(graphs_once: Path) -> None:
    """All builds here share what they trace."""


@pytest.fixture
def checkpoint(small_checkpoint: Path, tmp_path: Path) -> Path:
    """The smallest checkpoint, which the test may damage."""
    return shutil.copytree(small_checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def bundle_with_kernels(once: Once, small_bundle: Build) -> Path:
    """The smallest bundle, without engines, with the kernels of sm_86 and sm_89."""

    def make(folder: Path) -> None:
        bundle = shutil.copytree(small_bundle(), folder / "bundle")
        from densegeo.export.cubins import write_cubins
        from densegeo.runtime.backends.tensorrt_kernels import launched

        manifest = read_manifest(bundle)
        names = launched(manifest.decode, manifest.buckets[0].decoder.outputs[0].shape[1])
        contracts = write_cubins(bundle, (86, 89), names)
        files = {
            f"kernels/{one.file}": FileDigest((bundle / "kernels" / one.file).stat().st_size, one.digest)
            for one in contracts
        }
        write_manifest(
            bundle,
            msgspec.structs.replace(
                manifest,
                files=manifest.files | files,
                kernels=contracts,
                target_architectures=["sm_86", "sm_89"],
            ),
        )

    return once("plain-with-kernels", make) / "bundle"


@pytest.fixture(scope="session")
def engines_for_86(once: Once, bundle_with_kernels: Path) -> Path:
    """A bundle with engines for sm_86, made where torch and onnx cannot be imported; beside it what was printed."""

    def make(folder: Path) -> None:
        bundle = shutil.copytree(bundle_with_kernels, folder / "bundle")
        arguments = ("engines", bundle, "--gpu-arch", 86, "--builder", "tensorrt_rtx", "--weights", "input")
        code, out, err = run_without(folder, BUILD_SIDE, *arguments)
        assert code == 0, out + err
        (folder / "printed").write_text(out)

    return once("engines-without-torch", make) / "bundle"
