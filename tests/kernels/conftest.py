"""Where the kernels run: in Triton's interpreter on CPU tensors, or, under `-m gpu`, compiled on CUDA tensors.

Triton decides once, when it is first imported. So that is done here, before any test runs; when something imported it
earlier, the interpreted tests are skipped and `test_fresh_process.py` runs them in a process of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import pytest

OPERATIONS = (
    "split",
    "log_dequantize",
    "normals",
    "preprocess",
    "unproject",
    "layer_norm",
    "qk_norm_rope",
    "group_norm_silu",
    "gated_residual",
    "quantize",
    "gelu_quantize",
    "attention",
)
INTERPRET = "TRITON_INTERPRET"


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    if not installed() or ("gpu" in expression and "not gpu" not in expression):
        return
    if "triton" in sys.modules or INTERPRET in os.environ:
        return
    os.environ[INTERPRET] = "1"
    try:
        for operation in OPERATIONS:
            importlib.import_module(f"densegeo.kernels.{operation}.kernel")
    finally:
        del os.environ[INTERPRET]  # not for the processes that other tests start


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "triton"))


def interpreted() -> bool:
    from densegeo.kernels.split.kernel import split_kernel

    return type(split_kernel).__name__ == "InterpretedFunction"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a kernel's tensors; skips where Triton cannot run there."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if interpreted() != (request.param == "cpu"):
        pytest.skip("Triton was imported for the other mode; see test_fresh_process.py")
    if request.param == "cpu":
        monkeypatch.setenv(INTERPRET, "1")  # the interpreter loads parts of Triton at its first launch
    return str(request.param)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors hold NaN, 255 in bytes, -128 in signed ones: a value nobody wrote shows."""
    torch = pytest.importorskip("torch")
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Any) -> Any:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(-128 if tensor.dtype == torch.int8 else 255)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: poison(empty(*size, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *size, **options: poison(empty_like(*size, **options)))


def operation(name: str) -> tuple[ModuleType, ModuleType]:
    """The kernel and the reference module of an operation."""
    return tuple(importlib.import_module(f"densegeo.kernels.{name}.{part}") for part in ("kernel", "reference"))  # type: ignore[return-value]


@pytest.fixture
def picture() -> Any:
    """A smooth uint8 test image, 96 wide and 72 high, different in every channel."""
    import numpy as np

    y, x = np.mgrid[0:72, 0:96]
    return np.round(255 * np.stack([x / 95, y / 71, (x + y) / 166], axis=-1)).astype(np.uint8)
