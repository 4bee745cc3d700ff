"""A GPU that is shared: options that are refused, limits that are held, on backends that no GPU runs here.

The tensorrt backend's are counted over a driver in `tests/cuda/counts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from densegeo.errors import BackendError, ConfigError
from densegeo.runtime import Estimator
from densegeo.runtime.backends import ort as ort_module
from densegeo.runtime.backends.ort import OrtBackend, session_limits
from densegeo.runtime.backends.sharing import Need, Sharing, networks_need, require_room
from densegeo.runtime.bundle import FileDigest, read_manifest
from tests.support.doubles import OnnxRuntimeDouble

NewBundle = Callable[..., Path]
NEED = Need(1000, {"64x48": 100, "32x16": 50, "64x48_b2": 200}, {"64x48": 30, "32x16": 10, "64x48_b2": 60})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"priority": "high"}, "priority must be an integer"),
        ({"priority": True}, "priority must be an integer"),
        ({"memory_limit": 0}, "memory_limit must be a number of bytes above 0, not 0"),
        ({"memory_limit": 2.5e9}, "memory_limit must be a number of bytes above 0"),
        ({"priority": -1}, "are for a GPU, and onnxruntime runs on the CPU here"),
        ({"memory_limit": 10**9}, "are for a GPU, and onnxruntime runs on the CPU here"),
    ],
)
def test_what_cannot_be_is_refused(new_bundle: NewBundle, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Estimator(new_bundle(), "onnxruntime", "cpu", **options)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (1409, "64x48 with 32x16 would fit (0.00 MB; 64x48_b2 alone 0.00 MB): build a bundle of these alone, or raise"),
        (1409, "raise memory_limit to 1410."),
        (1259, "64x48 with 32x16 would fit (0.00 MB): build"),
        (1079, "32x16 would fit"),
        (1059, "Not even 32x16 alone fits"),
    ],
)
def test_a_limit_that_is_too_low_says_what_would_fit(limit: int, says: str) -> None:
    require_room(Path("bundle"), NEED, None, "cuda:0")
    require_room(Path("bundle"), NEED, 1410, "cuda:0")  # 1000 + 350 + the largest workspace
    with pytest.raises(BackendError, match=re.escape(says)):
        require_room(Path("bundle"), NEED, limit, "cuda:0")


def with_weights(new_bundle: NewBundle) -> tuple[Path, Any]:
    """A bundle whose files are as large as real ones are, in name."""
    import msgspec

    bundle = new_bundle()
    manifest = read_manifest(bundle)
    sizes = {"encoder": 70_000_000, "denoiser": 4_000_000_000, "decoder": 100_000_000}
    files = {f"{stage}.safetensors": FileDigest(size, "") for stage, size in sizes.items()}
    return bundle, msgspec.structs.replace(manifest, files=manifest.files | files)


def test_onnxruntime_holds_the_limit_session_by_session(new_bundle: NewBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, manifest = with_weights(new_bundle)
    sessions = OnnxRuntimeDouble()
    monkeypatch.setattr(ort_module, "import_onnxruntime", lambda: sessions)
    limit = 20_000_000_000
    OrtBackend(bundle, manifest, "cuda", sharing=Sharing(0, limit))
    given = [int(options[0]["gpu_mem_limit"]) for _, options in (call for call in sessions.calls if call != "preload")]
    assert len(given) == 3
    limits = session_limits(manifest, limit)
    assert given == [limits[getattr(manifest.buckets[0], stage).file] for stage in ("encoder", "denoiser", "decoder")]
    assert limit - len(limits) <= sum(limits.values()) <= limit
    assert max(limits.values()) > 4_000_000_000
    sessions.calls.clear()
    with pytest.raises(BackendError, match=re.escape("memory_limit is 4.00 GB")):
        OrtBackend(bundle, manifest, "cuda", sharing=Sharing(0, 4_000_000_000))
    assert not sessions.calls


def test_torch_holds_the_limit(new_bundle: NewBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from densegeo.runtime.backends.torch_modules import limit_memory

    bundle, manifest = with_weights(new_bundle)
    shares: list[tuple[float, Any]] = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80_000_000_000)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append((share, device))
    )
    limit_memory(bundle, manifest, "cuda:1", None)
    with pytest.raises(BackendError, match=r"Not even .* alone fits"):
        limit_memory(bundle, manifest, "cuda:1", networks_need(manifest).shared)
    assert not shares
    limit_memory(bundle, manifest, "cuda:1", 20_000_000_000)
    limit_memory(bundle, manifest, "cuda:1", 200_000_000_000)
    assert shares == [(0.25, torch.device("cuda:1")), (1.0, torch.device("cuda:1"))]


def test_torch_has_the_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from densegeo.runtime.backends.torch_transfer import Ring
    from tests.support.streams import Cuda

    cuda = Cuda(monkeypatch)
    monkeypatch.setattr("densegeo.runtime.backends.torch_transfer.Slot", lambda device: None)
    before = len(cuda.streams)
    Ring("cuda:1", -2)
    assert [stream.priority for stream in cuda.streams[before:]] == [-2] * 3
    with pytest.raises(ConfigError, match=re.escape("from -5 (before others) to 0 on cuda:1, not -9")):
        Ring("cuda:1", -9)
