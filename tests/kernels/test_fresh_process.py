"""A promise about processes: kernels load neither torch nor Triton before they are called."""

from __future__ import annotations

import subprocess
import sys

from tests.support.interpreter import OPERATIONS


def test_imports_are_light() -> None:
    names = ", ".join(f"densegeo.kernels.{name}" for name in (*OPERATIONS, "contract", "launch"))
    code = f"import sys, densegeo.kernels, {names}; print({{'torch', 'triton'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
