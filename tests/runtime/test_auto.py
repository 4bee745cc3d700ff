"""Which backend "auto" takes: any on the GPU before all on the CPU, with every reason against the others."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from densegeo.backends import BACKENDS, BackendRow
from densegeo.errors import BackendError
from densegeo.runtime import backends
from densegeo.runtime.backends import open_backend

HERE = Path("a-bundle")


class Doubles:
    """Rows in the table's place; each is given what it can run on, or why it cannot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **able: dict[str, str | None]) -> None:
        self.tried: list[tuple[str, str]] = []
        monkeypatch.setattr(backends, "BACKENDS", tuple(self._row(monkeypatch, *item) for item in able.items()))
        monkeypatch.setattr(backends, "has_cuda_driver", lambda: True)

    def _row(self, monkeypatch: pytest.MonkeyPatch, name: str, able: dict[str, str | None]) -> BackendRow:
        def opened(directory: Path, manifest: Any, device: str, sharing: Any) -> Any:
            self.tried.append((name, device))
            kinds = ("cuda", "cpu") if device == "auto" else (device,)
            kind = next((kind for kind in kinds if kind in able), None)
            if kind is None or able[kind] is not None:
                raise BackendError(able[kind] if kind else f"nothing on {device}")
            return SimpleNamespace(name=name, device="cuda:0" if kind == "cuda" else "cpu")

        monkeypatch.setitem(sys.modules, f"double_{name}", SimpleNamespace(open_backend=opened))
        return BackendRow(
            name=name,
            title=name,
            opens=f"double_{name}:open_backend",
            runs="graphs",
            modules=("numpy",),
            distributions=(("numpy",),),
            install="pip install it",
            devices=tuple(able),
        )


def test_a_gpu_comes_before_every_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    doubles = Doubles(
        monkeypatch,
        first={"cuda": "no cuDNN here", "cpu": None},
        host={"cpu": None},
        second={"cuda": None, "cpu": None},
    )
    backend = open_backend("auto", HERE, SimpleNamespace(), "auto")  # type: ignore[arg-type]
    assert (backend.name, backend.device) == ("second", "cuda:0")
    assert doubles.tried == [("first", "cuda"), ("second", "cuda")]
    assert not caplog.records
    assert open_backend("auto", HERE, SimpleNamespace(), "cpu").name == "first"  # type: ignore[arg-type]


def test_a_cpu_beside_a_gpu_is_said_with_every_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    doubles = Doubles(
        monkeypatch,
        gpu={"cuda": "too little memory"},
        both={"cuda": "no cuDNN here", "cpu": None},
    )
    with caplog.at_level(logging.WARNING, "densegeo"):
        assert open_backend("auto", HERE, SimpleNamespace(), "auto").device == "cpu"  # type: ignore[arg-type]
    (record,) = caplog.records
    for part in ("on the CPU with both", "gpu: too little memory", "both: no cuDNN here"):
        assert part in record.getMessage()
    assert doubles.tried == [("gpu", "cuda"), ("both", "cuda"), ("both", "cpu")]


def test_where_nothing_runs_every_reason_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Doubles(monkeypatch, one={"cuda": "no cuDNN", "cpu": "no bf16"}, two={"cuda": "damaged", "cpu": "damaged"})
    with pytest.raises(BackendError) as caught:
        open_backend("auto", HERE, SimpleNamespace(), "auto")  # type: ignore[arg-type]
    assert str(caught.value).splitlines()[1:] == ["one: no cuDNN", "two: damaged", "one: no bf16"]


def test_the_table_says_what_runs_where() -> None:
    assert {row.name: row.devices for row in BACKENDS} == {
        "tensorrt": ("cuda",),
        "onnxruntime-tensorrt": ("cuda",),
        "onnxruntime": ("cuda", "cpu"),
        "openvino": ("cpu",),
        "torch": ("cuda", "cpu"),
    }
