"""Stand-ins for a backend and its library, and nothing of what is tested with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from densegeo.runtime import Estimator
from densegeo.runtime import estimator as estimator_module
from densegeo.runtime.backends.ort import CPU, CUDA
from densegeo.runtime.bundle import Bucket, Stage

Hook = Callable[[Bucket, Stage, float], object]


class FakeBackend:
    """A `Backend` of microseconds: every array is constant, so a result tells which image it came from.

    hook: called at every run with the array's value; may record, raise or block.
    """

    name, device = "fake", "cpu"

    def __init__(self, hook: Hook = lambda bucket, stage, value: None) -> None:
        self.hook, self.closed = hook, False

    def run(self, bucket: Bucket, stage: Stage, array: np.ndarray) -> np.ndarray:
        value = float(array.flat[0])
        self.hook(bucket, stage, value)
        graph: Any = getattr(bucket, stage)
        return np.full(graph.outputs[0].shape, value, np.float32)

    def close(self) -> None:
        self.closed = True


def fake_estimator(bundle: Path, hook: Hook = lambda bucket, stage, value: None, **options: Any) -> Estimator:
    """An estimator whose graphs are run by a `FakeBackend`. The bundle is one of the fixtures'."""
    with patch.object(estimator_module, "open_backend", lambda *arguments: FakeBackend(hook)):
        return Estimator(bundle, device="cpu", check_digests=False, **options)


def constant_image(level: float, width: int = 16, height: int = 16) -> np.ndarray:
    """A grey image; levels in [0.5, 0.7] stay apart through `FakeBackend` and the fixtures' decode parameters."""
    return np.full((height, width, 3), level, np.float32)


def level_of(prediction: np.ndarray) -> float:
    """The level of the image that a prediction came from, by p = (-(2 level - 1) / 0.5 + 0.1) / 2 + 0.5."""
    assert np.ptp(prediction) < 1e-6
    return (1.55 - float(prediction[0, 0])) / 2


class Gate:
    """Holds whoever calls it until it is opened, and says who is inside."""

    def __init__(self) -> None:
        self._entered = threading.Semaphore(0)
        self._opened = threading.Semaphore(0)
        self.calls: list[object] = []

    def __call__(self, call: object) -> object:
        self.calls.append(call)
        self._entered.release()
        assert self._opened.acquire(timeout=30), "the gate was never opened"
        return call

    def wait_until_entered(self) -> None:
        assert self._entered.acquire(timeout=30), "nobody came"

    def open(self, times: int = 1000) -> None:
        self._opened.release(times)


class OnnxRuntimeDouble:
    """ONNX Runtime with the CUDA provider, without any session: what it is asked for, in order."""

    def __init__(self, *, preloads: bool = True) -> None:
        self.calls: list[Any] = []
        self.SessionOptions = lambda: SimpleNamespace(add_session_config_entry=lambda *entry: None)
        if preloads:
            self.preload_dlls = self._preload

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def _preload(self) -> None:
        self.calls.append("preload")
        print("Failed to load libcudnn")

    def InferenceSession(
        self, path: str, options: Any, providers: list[str], provider_options: list[Any], **more: int
    ) -> Any:
        self.calls.append((providers, provider_options))
        return SimpleNamespace(get_providers=lambda: providers)
