"""Cases over the stand-in driver, one a function, tried in one child process.

python -m tests.cuda.case BUNDLE prints, as JSON, what went wrong in which; LD_LIBRARY_PATH leads to the stand-in.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from densegeo.runtime import Estimator
from densegeo.runtime.backends.cuda_memory import Memory
from densegeo.runtime.verify import relative_error
from tests.cuda.exercise import BOUND, DEVICE, Setup, staged

MODULES = ("former_faults", "counts", "sessions")  # of this package, with the cases
CASES: list[Callable[[Setup], None]] = []


def case(function: Callable[[Setup], None]) -> Callable[[Setup], None]:
    CASES.append(function)
    return function


@contextmanager
def opened(setup: Setup, device: int = DEVICE, **options: Any) -> Iterator[Any]:
    with Estimator(setup.bundle, "tensorrt", f"cuda:{device}", check_digests=False, **options) as estimator:
        yield estimator


def close_to(setup: Setup, index: int, prediction: Any) -> None:
    error = relative_error(prediction, setup.wanted[index].prediction)  # type: ignore[arg-type]
    assert error <= BOUND, error


def foreign() -> Memory:
    from cuda.core import Device

    return Memory(Device(DEVICE))


@contextmanager
def refusing(setup: Setup, what: str, engine: str) -> Iterator[None]:
    """TensorRT refuses this of this engine."""
    setup.library.refusing.add((what, f"engines/{engine}.standin.engine"))
    try:
        yield
    finally:
        setup.library.refusing.clear()


@contextmanager
def logged() -> Iterator[list[str]]:
    """The warnings; whole records are held too, with all that they hold."""
    lines: list[str] = []
    records: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            records.append(record)

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("densegeo")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def main(bundle: Path) -> None:
    for module in MODULES:
        import_module(f"tests.cuda.{module}")
    said = {}
    with staged(bundle) as setup:
        for function in CASES:
            setup.driver.schedule("lazy")
            try:
                function(setup)
                assert not setup.driver.failures, setup.driver.failures
                assert not setup.driver.problems, setup.driver.problems
                assert not setup.library.misaligned, setup.library.misaligned
                assert setup.driver.captures == 0, "a stream is still recorded"
                said[function.__name__] = ""
            except Exception:
                said[function.__name__] = traceback.format_exc()
    print(json.dumps(said))


if __name__ == "__main__":
    from tests.cuda.case import main as run  # whose table the cases are in

    run(Path(sys.argv[1]))
