"""Numbers computed by the models' authors' code: one configuration each in `tests/golden`, larger ones elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The configurations in the repository."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def larger_golden() -> Path:
    """The larger configurations; DENSEGEO_GOLDEN says where they lie."""
    folder = Path(os.environ.get("DENSEGEO_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        message = f"the larger golden numbers are not at {folder}; set DENSEGEO_GOLDEN"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session", params=["golden", "larger_golden"])
def each_golden(request: pytest.FixtureRequest) -> Path:
    """First the configurations in the repository, then the larger ones."""
    folder: Path = request.getfixturevalue(request.param)
    return folder
