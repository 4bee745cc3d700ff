"""The bundle of the bags' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundle(toy_bundle: Path) -> Path:
    """A bundle of one 64x48 bucket, shared between tests: not to be changed."""
    return toy_bundle
