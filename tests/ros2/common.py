"""What all cases share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from densegeo.runtime import Estimator, Geometry
from tests.support.ros import camera_info

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}
MEASUREMENTS: dict[str, Case] = {}
WIDTH, HEIGHT = 96, 64
INFO = camera_info(WIDTH, HEIGHT)
AGE = "stamp to publication ms"
RANGE = {"near": 0.5, "far": 10.0}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def measurement(function: Case) -> Case:
    """A case that says something on a quiet machine alone: run when it is named."""
    MEASUREMENTS[function.__name__] = function
    return function


def picture(seed: int, shape: tuple[int, ...] = (HEIGHT, WIDTH, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def wanted(bundle: Path, array: Any, color: str = "rgb", **metric: Any) -> Geometry:
    with Estimator(bundle, device="cpu") as estimator:
        geometry = estimator(array, color)  # type: ignore[arg-type]
    return geometry.to_metric(**metric) if metric else geometry
