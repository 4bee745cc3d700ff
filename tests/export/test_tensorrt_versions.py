"""What TensorRT's versions have and lack (docs/tensorrt.md): a builder and contexts with one version's names alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from densegeo.export.engine_builder import EngineOptions
from densegeo.export.renewal import renew
from densegeo.runtime.backends.tensorrt_context import make_context
from densegeo.runtime.backends.tensorrt_engines import load_library
from densegeo.runtime.bundle import check_files, read_manifest
from densegeo.runtime.engines import select_engine
from tests.support.absent import ABSENT
from tests.support.project import ROOT

# The installed builder under another name, with what the bindings of 10.3 and the worker both name, and no more.
OLDER = """
import tensorrt_rtx
for name in ("Builder", "BuilderFlag", "ILogger", "IProgressMonitor", "Logger", "MemoryPoolType",
             "NetworkDefinitionCreationFlag", "OnnxParser", "ProfilingVerbosity", "Runtime"):
    globals()[name] = getattr(tensorrt_rtx, name)
__version__ = "10.3.0"
"""
STRATEGY = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"))


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import tensorrt` finds it, here and in the builder's process; torch and onnx are not found there."""
    site = tmp_path / "site"
    (site / "tensorrt-10.3.0.dist-info").mkdir(parents=True)
    (site / "tensorrt-10.3.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.3.0\n"
    )
    (site / "tensorrt.py").write_text(OLDER)
    (site / "sitecustomize.py").write_text(ABSENT.format(names={"torch", "onnx"}))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    sys.modules.pop("tensorrt", None)


@pytest.mark.thorough
@pytest.mark.integration
@pytest.mark.usefixtures("older")
def test_tensorrt_10_3_adds_its_engines_beside_those_of_rtx(engines_for_86: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(engines_for_86, tmp_path / "bundle")
    before = read_manifest(bundle)
    done = renew(bundle, (86,), EngineOptions(library="tensorrt", weights="input"), Console(quiet=True))
    after = read_manifest(bundle)
    check_files(bundle, after)
    assert done.replaced == []
    assert [(engine.library, engine.version) for engine in done.added] == [("tensorrt", "10.3.0")] * 3
    assert after.engines == [*done.added, *before.engines]
    for library, version in (("tensorrt", "10.3.0"), ("tensorrt_rtx", before.engines[0].version)):
        actual = select_engine(
            bundle, after, "denoiser", after.buckets[0], library=library, version=version, architecture=86
        )
        assert (actual.library, actual.architectures) == (library, ["sm_86"])
    assert load_library(after, 86)[0] == "tensorrt"
    assert load_library(before, 86)[0] == "tensorrt_rtx"


@pytest.mark.parametrize("version", ["10.3", "10.11", "rtx"])
def test_a_context_is_made_with_what_the_version_has(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given: list[Any] = []
    config = SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: given.append(strategy))
    if version == "rtx":
        cache = SimpleNamespace(deserialize=lambda data: True, serialize=lambda: b"")
        config.create_runtime_cache = lambda: cache
        config.set_runtime_cache = lambda cache: True
    engine = SimpleNamespace(create_execution_context=lambda how: ("context", how))
    if version != "10.3":
        engine.create_runtime_config = lambda: config
    context, compiled = make_context(STRATEGY, engine, tmp_path / "x.engine", "0" * 64, "GPU")
    assert context == ("context", "user managed" if version == "10.3" else config)
    assert given == ([] if version == "10.3" else ["user managed"])
    assert (compiled is not None) == (version == "rtx")
