"""Promises about processes: light imports, and the interpreted tests when Triton came too early for this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRET, OPERATIONS, installed, interpreted

ROOT = Path(__file__).resolve().parents[2]
FILES = tuple(
    f"tests/kernels/test_{name}.py" for name in ("kernels", "network_kernels", "transformer_kernels", "attention")
)


def test_imports_are_light() -> None:
    names = ", ".join(f"densegeo.kernels.{name}" for name in (*OPERATIONS, "contract", "launch"))
    code = f"import sys, densegeo.kernels, {names}; print({{'torch', 'triton'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.skipif(not installed(), reason="torch or triton is missing")
def test_interpreted_elsewhere_when_triton_came_early() -> None:
    if interpreted():
        pytest.skip("the interpreted tests run in this process")
    command = [sys.executable, "-m", "pytest", *FILES, "-m", "not gpu and not slow"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {INTERPRET: "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
