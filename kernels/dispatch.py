"""Which of an operation's two implementations runs on a tensor."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def implementation(package: str, tensor: torch.Tensor) -> Any:
    """The operation's module `kernel` for a tensor on a CUDA device, else `reference`; loaded when first asked for.

    package: the operation's own, `__name__` in its `__init__.py`.
    """
    return _load(f"{package}.{'kernel' if tensor.is_cuda else 'reference'}")


_load = lru_cache(maxsize=None)(import_module)
