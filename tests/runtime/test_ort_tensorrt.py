"""ONNX Runtime's TensorRT provider: offered, refused with the reason, and what it is asked for. No GPU runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from densegeo.backends import BackendRow, backend_row
from densegeo.errors import BackendError
from densegeo.onnx_runtime import RESTING
from densegeo.runtime import backends
from densegeo.runtime.backends import open_backend
from densegeo.runtime.backends import ort as ort_module
from densegeo.runtime.backends.ort import ALL_OR_NONE, CPU, CUDA, TENSORRT, choose_provider, engine_cache, open_tensorrt
from densegeo.runtime.bundle import Quantization, read_manifest
from densegeo.runtime.verified import remember

NAME = "onnxruntime-tensorrt"
ROW = backend_row(NAME)
NewBundle = Callable[..., Path]


class Library:
    """ONNX Runtime built with TensorRT, without any session: what it is asked for, in order."""

    def __init__(self, *, started: bool = True) -> None:
        self.started = started
        self.entries: list[tuple[str, str]] = []
        self.sessions: list[dict[str, Any]] = []

    def get_available_providers(self) -> list[str]:
        return [TENSORRT, CUDA, CPU]

    def SessionOptions(self) -> Any:
        return SimpleNamespace(add_session_config_entry=lambda *entry: self.entries.append(entry))

    def InferenceSession(self, path: str, options: Any, **given: Any) -> Any:
        self.sessions.append(given)
        return SimpleNamespace(get_providers=lambda: [TENSORRT if self.started else CPU])


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    """A machine that has all of it."""
    made = Library()
    modules = {"onnxruntime": made, "tensorrt": SimpleNamespace()}
    monkeypatch.setattr(ort_module, "import_module", lambda name: modules[name])
    monkeypatch.setattr(ort_module, "import_onnxruntime", lambda: modules["onnxruntime"])
    monkeypatch.setattr(ort_module, "has_cuda_driver", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
def test_what_it_is_asked_for(library: Library, new_bundle: NewBundle, tmp_path: Path, base: str) -> None:
    bundle = new_bundle(precision=base)
    backend = open_tensorrt(bundle, read_manifest(bundle), "cuda:1")
    assert (backend.name, backend.device) == (NAME, "cuda:1")
    assert library.entries == [RESTING, ALL_OR_NONE] * 3
    folder = engine_cache(read_manifest(bundle), "1")
    assert folder is not None
    assert folder.parent == tmp_path / "cache" / "densegeo" / NAME
    assert folder.stat().st_mode & 0o777 == 0o700
    for given in library.sessions:
        assert given == {
            "providers": [TENSORRT],
            "provider_options": [
                {
                    "device_id": "1",
                    "trt_fp16_enable": str(base == "fp16"),
                    "trt_bf16_enable": str(base == "bf16"),
                    "trt_engine_cache_enable": "True",
                    "trt_engine_cache_path": str(folder),
                    "trt_timing_cache_enable": "True",
                    "trt_timing_cache_path": str(folder),
                }
            ],
            "enable_fallback": 0,
        }


def test_bundles_and_gpus_share_no_engines(library: Library, new_bundle: NewBundle) -> None:
    """The provider knows a graph by its names: two bundles whose weights differ have the same."""
    first, second = (read_manifest(new_bundle(references=factor)) for factor in (1.0, 1.5))
    assert engine_cache(first, "0") == engine_cache(first, "0")
    assert len({engine_cache(first, "0"), engine_cache(second, "0"), engine_cache(first, "1")}) == 3


def test_without_a_cache_folder_it_runs_all_the_same(
    library: Library, new_bundle: NewBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    bundle = new_bundle()
    open_tensorrt(bundle, read_manifest(bundle), "auto")
    assert set(library.sessions[0]["provider_options"][0]) == {"device_id", "trt_fp16_enable", "trt_bf16_enable"}


def test_it_falls_back_to_nothing(library: Library, new_bundle: NewBundle) -> None:
    library.started = False
    bundle = new_bundle()
    with pytest.raises(BackendError, match=r"could not start TensorrtExecutionProvider.*another version.*another back"):
        open_tensorrt(bundle, read_manifest(bundle), "cuda")


def test_a_broken_tensorrt(library: Library, new_bundle: NewBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open")
        return library

    monkeypatch.setattr(ort_module, "import_module", without)
    bundle = new_bundle()
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported \(libnvinfer.*pip install tensorrt"):
        open_tensorrt(bundle, read_manifest(bundle), "auto")


@pytest.mark.parametrize(
    ("device", "available", "driver", "message"),
    [
        ("cpu", [TENSORRT, CPU], True, r"runs on NVIDIA GPUs only. Use backend=\"onnxruntime\""),
        ("auto", [CUDA, CPU], True, r"no TensorRT provider.*in place of the extra cpu: pip install \"\.\[gpu\]\""),
        ("cuda:0", [CPU], True, "no TensorRT provider"),
        ("auto", [TENSORRT, CPU], False, "no NVIDIA driver here"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, device: str, available: list[str], driver: bool, message: str
) -> None:
    monkeypatch.setattr(ort_module, "has_cuda_driver", lambda: driver)
    with pytest.raises(BackendError, match=message):
        choose_provider(ROW, device, available)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_it_takes_no_8_bits(library: Library, new_bundle: NewBundle, precision: str) -> None:
    bundle = new_bundle()
    plan = Quantization(
        format=precision,
        method="mse",
        smooth=0.0,
        linears=["a"],
        attentions=[],
        share=1.0,
        depth_error=None,
        normal_error=None,
    )
    manifest = msgspec.structs.replace(read_manifest(bundle), precision=precision, base="fp32", quantization=plan)
    with pytest.raises(BackendError, match=rf"is {precision}, and .*TensorRT provider has no .*--precision fp32"):
        open_tensorrt(bundle, manifest, "auto")
    assert not library.sessions


def test_the_real_library_without_the_provider(bundle: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if TENSORRT in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(BackendError, match="This ONNX Runtime has no TensorRT provider"):
        open_tensorrt(bundle, read_manifest(bundle), "auto")


def test_the_real_library_knows_all_or_none(bundle: Path) -> None:
    """On a build for CPUs every graph would fall back to the CPU's provider, so each is refused."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(*ALL_OR_NONE)
    path = str(bundle / read_manifest(bundle).buckets[0].encoder.file)
    with pytest.raises(Exception, match=r"(?i)fallback|explicitly disabled|conflict"):
        onnxruntime.InferenceSession(path, options, providers=[CPU], enable_fallback=0)


def test_what_is_not_installed_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (ROW,))
    monkeypatch.setattr(BackendRow, "available", lambda row: False)
    for name in (NAME, "auto"):
        with pytest.raises(BackendError, match=rf"{NAME}: not installed; pip install \"\.\[gpu\]\" tensorrt"):
            open_backend(name, bundle, read_manifest(bundle), "auto")


def test_auto_takes_it_only_for_what_was_verified(
    library: Library, new_bundle: NewBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(backends, "BACKENDS", (ROW,))
    monkeypatch.setattr(backends, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(BackendRow, "available", lambda row: True)
    bundle = new_bundle()
    with pytest.raises(BackendError, match=rf"not verified on this machine; `densegeo verify .* --backend {NAME}`"):
        open_backend("auto", bundle, read_manifest(bundle), "auto")
    remember(bundle, NAME, "cuda:0")
    assert open_backend("auto", bundle, read_manifest(bundle), "auto").device == "cuda:0"
    assert "tensorrt" not in sys.modules
