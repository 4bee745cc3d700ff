"""Triton kernels on a CPU, through Triton's interpreter.

Triton decides when it is first imported whether kernels are interpreted (on CPU tensors) or compiled (on CUDA tensors).
So `start_interpreter` runs before anything else of a test run; `-m gpu` leaves it out. Processes that tests start see
nothing of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

import pytest

from densegeo.kernels.table import variants

INTERPRET = "TRITON_INTERPRET"
RAN = ("kernels", "interpreted")  # what a test reports that ran a kernel here


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "triton"))


def start_interpreter() -> None:
    """Import Triton and every kernel in the interpreter's mode."""
    if not installed():
        return
    if "triton" in sys.modules or INTERPRET in os.environ:
        raise pytest.UsageError(f"Triton was imported before the tests could choose its mode, or {INTERPRET} is set")
    os.environ[INTERPRET] = "1"
    try:
        variants()
    finally:
        del os.environ[INTERPRET]  # not for the processes that tests start


def interpreted() -> bool:
    from densegeo.kernels.split.kernel import split_kernel

    return type(split_kernel).__name__ == "InterpretedFunction"


def operation(name: str) -> tuple[ModuleType, ModuleType]:
    """The kernel and the reference module of an operation."""
    return tuple(importlib.import_module(f"densegeo.kernels.{name}.{part}") for part in ("kernel", "reference"))  # type: ignore[return-value]
