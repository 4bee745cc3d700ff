"""Promises about imports, kept in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

FORBIDDEN = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "safetensors",
    "prometheus_client",
    "densegeo.export",
    "densegeo.models",
    "densegeo.calibration",
    "densegeo.training",
)

RUN = """
import sys
import numpy as np
from densegeo.runtime import Estimator
assert "onnxruntime" not in sys.modules, "onnxruntime is imported before a backend needs it"
with Estimator(sys.argv[1]) as estimator:
    result = estimator(np.full((50, 60, 3), 0.3, np.float32)).to_metric(scale=1, shift=0)
    result.save(sys.argv[2], ["npy", "png", "png16", "ply"], intrinsics=(50, 50, 30, 25))
print("\\n".join(sys.modules))
"""

TIME = """
import time
start = time.process_time()  # importing is one busy thread: wall time minus what other processes took
import densegeo.runtime
print(time.process_time() - start)
"""


def fresh(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bundle_runs_without_the_build_side(bundle: Path, tmp_path: Path) -> None:
    loaded = fresh(RUN, str(bundle), str(tmp_path / "out")).splitlines()
    assert "onnxruntime" in loaded
    roots = {".".join(name.split(".")[:depth]) for name in loaded for depth in (1, 2)}
    assert roots.isdisjoint(FORBIDDEN)


def test_import_takes_under_300_ms() -> None:
    assert min(float(fresh(TIME)) for _ in range(3)) < 0.3


def test_the_bare_folder_gives_the_same_class() -> None:
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from runtime import Estimator as a; "
        "from densegeo import Estimator as b; print(a is b)"
    )
    assert fresh(code, str(root)).strip() == "True"
