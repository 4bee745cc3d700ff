"""Inputs, bounds and comparisons of the kernels' tests.

Bounds: float32 within 1e-5; low precision at most twice the error of the same computation in plain torch of that
precision, both against float64 (relative L2 norm).
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

BOUND = 1e-5
LOW = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *LOW]
EPS = 1e-6


def noise(*shape: int, device: str, dtype: Any = torch.float32, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def spread(tensor: Any) -> Any:
    """The same values with gaps between rows and between columns."""
    shape = (*tensor.shape[:-2], tensor.shape[-2] + 3, 2 * tensor.shape[-1] + 1)
    wide = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    view = wide[..., 2 : 2 + tensor.shape[-2], 1::2]
    view.copy_(tensor)
    return view


def error(actual: Any, exact: Any) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def assert_as_good(actual: Any, plain: Any, exact: Any) -> None:
    assert torch.isfinite(actual).all()
    assert error(actual, exact) <= 2 * error(plain, exact)


def close(actual: Any, exact: Any) -> None:
    assert torch.isfinite(actual).all()
    assert error(actual, exact) <= BOUND


def stored(x: Any, dtype: Any, device: str) -> Any:
    """float32 rounded as a kernel's store rounds: to nearest, but Triton's interpreter cuts bf16's bits off."""
    if device == "cpu" and dtype == torch.bfloat16:
        return (x.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return x.to(dtype)


def affine(features: int, device: str) -> tuple[Any, Any]:
    return 1 + 0.3 * noise(features, device=device, seed=1), noise(features, device=device, seed=2)


def rope(tokens: int, size: int, device: str) -> tuple[Any, Any]:
    angles = 2 * noise(tokens, size // 2, device=device, seed=3)
    return angles.cos(), angles.sin()
