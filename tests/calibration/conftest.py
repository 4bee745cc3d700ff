"""The smallest real network, images, and both formats' plans; made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo.calibration.command import calibrate
from densegeo.export.build import build_bundle
from tests.export.test_build import options, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="session")
def bundle(checkpoint_dir: Path) -> Path:
    return build_bundle(options(checkpoint_dir, checkpoint_dir.parent / "fp32"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(12):
        coarse = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 32)).save(folder / f"{index:02d}.png")
    return folder


def run(bundle: Path, images: Path, output: Path, **changes: object) -> None:
    values: dict[str, object] = {"kind": "fp8", "method": "mse", "smooth": 0.0, "everything": False}
    values |= {
        "attention": False,
        "max_depth_error": None,
        "max_normal_error": None,
        "backend": "onnxruntime",
        "device": "cpu",
        "stream": False,
    }
    calibrate(bundle, [str(images)], output, **(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def calibrated(bundle: Path, images: Path) -> Path:
    """Statistics and both formats' plans."""
    folder = bundle.with_name("calibration")
    run(bundle, images, folder, kind="fp8")
    run(bundle, images, folder, kind="int8", method="entropy")
    return folder


@pytest.fixture(scope="session")
def attentive(bundle: Path, images: Path) -> Path:
    """Statistics of linears and attentions, and an fp8 plan of both."""
    folder = bundle.with_name("attentive")
    run(bundle, images, folder, attention=True)
    return folder
