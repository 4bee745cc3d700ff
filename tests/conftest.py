"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background jobs inherit it: tests interrupt builds
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests remember about this machine stays out of the user's state."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers computed by the authors' code; DENSEGEO_GOLDEN overrides where it lies."""
    folder = Path(os.environ.get("DENSEGEO_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        message = f"golden numbers are not at {folder}; set DENSEGEO_GOLDEN"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder
