"""A promise about processes: kernels load neither torch nor Triton before they are called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from densegeo.kernels.table import operations

pytestmark = pytest.mark.integration


def test_imports_are_light() -> None:
    names = ", ".join(f"densegeo.kernels.{name}" for name in (*operations(), "contract", "launch", "table", "compile"))
    code = f"import sys, densegeo.kernels, {names}; print({{'torch', 'triton'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
