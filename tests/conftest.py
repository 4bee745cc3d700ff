"""What holds for every test: the tiers, Triton's mode, the user's state; fixtures for many come from `tests/support`.

Tiers: `unit` is every test without a tier's mark; `make test` adds `integration`, and `make test-thorough`, which CI
runs, `thorough` too.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.interpreter import RAN, start_interpreter

pytest_plugins = ["tests.support.golden", "tests.support.shared"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background jobs inherit it: tests interrupt builds
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    compiled = "gpu" in expression and "not gpu" not in expression
    starts_workers = bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")
    if not compiled and not starts_workers:
        start_interpreter()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared_folder" in getattr(item, "fixturenames", ()):  # of tests/support/shared.py
            item.add_marker("integration")
        tiers = ("integration", "thorough", "slow", "ros", "fleet", "gpu")
        if not any(map(item.get_closest_marker, tiers)):
            item.add_marker("unit")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """.ci/run reads this line: a run that left the kernels out must not pass for one that tested them."""
    if terminalreporter.config.option.collectonly:
        return
    passed = terminalreporter.stats.get("passed", [])
    count = sum(list(RAN) in [list(given) for given in report.user_properties] for report in passed)
    terminalreporter.write_line(f"kernels in Triton's interpreter: {count} passed")


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests remember about this machine stays out of the user's state."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth uint8 test image, 96 wide and 72 high, different in every channel."""
    y, x = np.mgrid[0:72, 0:96]
    planes = [x / 95, y / 71, (x + y) / 166]
    return np.round(255 * np.stack(planes, axis=-1)).astype(np.uint8)


@pytest.fixture
def new_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Makes a fresh toy bundle that the test may damage; takes the keyword arguments of `make_toy_bundle`."""
    from tests.support.toy_bundle import make_toy_bundle

    return lambda **options: make_toy_bundle(tmp_path / f"bundle{len(list(tmp_path.iterdir()))}", **options)


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle of one 64x48 bucket with stored references, shared between tests: not to be changed."""
    from tests.support.toy_bundle import make_toy_bundle

    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle", references=1.0)
