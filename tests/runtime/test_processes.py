"""Estimators in other processes: forked, spawned, pickled, in a DataLoader's workers. Nothing hangs, nor at exit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densegeo.runtime import Estimator
from tests.support.toy_bundle import make_toy_bundle

ROOT = Path(__file__).parents[2]
REFUSED = ("call", "submit", "batch", "tensors", "put", "read")
SOON_S = 5.0  # seconds until an action in a child has its answer

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@posix
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("onnxruntime", marks=pytest.mark.thorough),
        pytest.param("openvino", marks=pytest.mark.thorough),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(300)
def test_other_processes(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip(backend)
    bundle = "fe2e-tiny" if backend == "torch" else str(make_toy_bundle(tmp_path / "toy"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.processes", bundle, backend],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name, answer in report["forked"].items():
        assert answer["status"] == 7, (name, answer)  # it ended by itself
        assert answer["seconds"] < SOON_S, (name, answer)
        if name.split()[-1] in REFUSED:
            assert answer["said"].startswith("BackendError: This estimator was made before a fork"), (name, answer)
        else:
            assert answer["said"] == "returned", (name, answer)
    assert all(report["same"].values()), report["same"]
    assert report["spawned"] == [backend, 0]
    assert "was made before a fork" in report["loader by fork"]
    assert report["afterwards"]


def test_a_copy_is_opened_with_the_same_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_toy_bundle(tmp_path / "toy")
    image = np.random.default_rng(2).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    with Estimator("toy", "onnxruntime", fit="pad", max_pixels=5000) as estimator:
        monkeypatch.chdir("/")  # the path was relative
        with copy.copy(estimator) as again:
            assert again is not estimator
            assert np.array_equal(again(image).prediction, estimator(image).prediction)
            with pytest.raises(ValueError, match="million pixels"):
                again(np.zeros((100, 100, 3), np.uint8))
    backend = Estimator(tmp_path / "toy", "onnxruntime")._backend
    with Estimator.from_backend(backend, estimator.manifest) as bare, pytest.raises(TypeError, match="open already"):
        copy.copy(bare)
