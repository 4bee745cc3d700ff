"""`densegeo calibrate` on the smallest networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from densegeo.calibration.command import calibrate
from densegeo.runtime import Estimator
from densegeo.runtime.tensorfile import read_tensors
from densegeo.runtime.verify import run_stages

TWICE = ["decoder.up.0.block.1.conv1", "encoder.down.0.downsample.conv"]  # convolutions in two products


def write_images(folder: Path) -> None:
    """Twelve blurred random pictures, 48 wide and 32 high."""
    rng = np.random.default_rng(0)
    for index in range(12):
        coarse = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 32)).save(folder / f"{index:02d}.png")


def run(bundle: Path, images: Path, output: Path, **changes: object) -> None:
    """Calibrate to an fp8 plan of linears, or what `changes` say."""
    values: dict[str, object] = {
        "kind": "fp8",
        "method": "mse",
        "smooth": 0.0,
        "everything": False,
        "attention": False,
        "max_depth_error": None,
        "max_normal_error": None,
        "backend": "onnxruntime",
        "device": "cpu",
        "stream": False,
        "twice": False,
    }
    calibrate(bundle, [str(images)], output, **(values | changes))  # type: ignore[arg-type]


def write_plans(bundle: Path, images: Path, folder: Path) -> None:
    """Statistics of linears, and both formats' plans."""
    run(bundle, images, folder, kind="fp8")
    run(bundle, images, folder, kind="int8", method="entropy")


def stage_error(bundle: Path, backend: str, output: str) -> float:
    """The largest error of a stage's output in a run from end to end."""
    with Estimator(bundle, backend, "cpu") as estimator:
        path = bundle / estimator.manifest.verification.inputs
        checks = run_stages(estimator, read_tensors(path), path)
    return max(check.error for check in checks if check.output == output)
