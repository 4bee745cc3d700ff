"""What a bundle has in float32 is multiplied in float32: TF32 would round its operands to 11 bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from densegeo.errors import BackendError
from densegeo.runtime.backends import ort as ort_module
from densegeo.runtime.backends.ort import CPU, CUDA, OrtBackend
from densegeo.runtime.bundle import read_manifest
from tests.support.doubles import OnnxRuntimeDouble


@pytest.mark.integration
def test_tensorrt_builds_engines_without_tf32() -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("torch")
    code = """
import tensorrt_rtx as trt
from densegeo.export.engine_worker import Spec, _configure
from densegeo.export.engine_builder import EngineOptions
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
config = builder.create_builder_config()
options = EngineOptions().settings()
spec = Spec(library="tensorrt_rtx", graph="", engine="", log="", timing_cache="", targets=[], options=options,
            memory_bytes=0)
before = config.get_flag(trt.BuilderFlag.TF32)
_configure(trt, config, spec)
print(before, config.get_flag(trt.BuilderFlag.TF32), options["tf32"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True False 0", done.stderr  # in the options it is part of the fingerprint


@pytest.mark.parametrize("preloads", [True, False])
def test_onnxruntime_on_a_gpu_loads_its_libraries_and_has_no_tf32(
    new_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    preloads: bool,
) -> None:
    sessions, bundle = OnnxRuntimeDouble(preloads=preloads), new_bundle()
    monkeypatch.setattr(ort_module, "import_onnxruntime", lambda: sessions)
    OrtBackend(bundle, read_manifest(bundle), "cuda:1")
    options = {
        "device_id": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
    }
    sizes = [([CUDA], [options])] * 3
    assert sessions.calls == (["preload", *sizes] if preloads else sizes)
    assert not capsys.readouterr().out
    sessions.calls.clear()
    OrtBackend(bundle, read_manifest(bundle), "cpu")
    assert sessions.calls == [([CPU], [{}])] * 3


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_onnxruntime_refuses_bf16_with_the_reason(
    new_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    sessions, bundle = OnnxRuntimeDouble(), new_bundle(precision="bf16")
    monkeypatch.setattr(ort_module, "import_onnxruntime", lambda: sessions)
    monkeypatch.setattr(ort_module, "has_cuda_driver", lambda: True)
    with pytest.raises(
        BackendError, match=r"is bf16.*neither on CPUs nor on GPUs.*backend=\"torch\".*--precision fp32"
    ):
        OrtBackend(bundle, read_manifest(bundle), device)
    assert not sessions.calls
