"""Pictures and a server that many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.serving import Served, served


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """(45, 61, 3) uint8, of no bucket's size."""
    return np.random.default_rng(3).integers(0, 256, (45, 61, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def server(toy_bundle: Path) -> Iterator[Served]:
    """Over the toy bundle, for the tests of one file."""
    with served(toy_bundle) as running:
        yield running
