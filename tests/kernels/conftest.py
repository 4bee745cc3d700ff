"""Where a kernel's test runs, and what surrounds its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.interpreter import INTERPRET, RAN, interpreted


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a kernel's tensors: "cpu" in the interpreter, or "cuda" compiled (`pytest -m gpu`)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if interpreted():
            pytest.skip("this run interprets the kernels; pytest -m gpu compiles them")
    else:
        assert interpreted(), "Triton was imported before tests/conftest.py could choose its interpreter"
        monkeypatch.setenv(INTERPRET, "1")  # the interpreter loads parts of Triton at its first launch
        request.node.user_properties.append(RAN)
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
