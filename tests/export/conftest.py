"""A checkpoint for one test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def graphs(graphs_once: Path) -> None:
    """All builds here share what they trace."""


@pytest.fixture
def checkpoint(small_checkpoint: Path, tmp_path: Path) -> Path:
    """The smallest checkpoint, which the test may damage."""
    return shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
