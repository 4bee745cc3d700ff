"""The cases of `results.py` and `life.py`, each a test, in the environment with rclpy and a network of its own."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ros2.environment import interpreter, run

SOURCES = [Path(__file__).parent / name for name in ("results.py", "life.py")]
DECORATOR = "case"
NAMES = [  # the modules themselves are for that environment
    function.name
    for source in SOURCES
    for function in ast.parse(source.read_text()).body
    if isinstance(function, ast.FunctionDef) and [ast.unparse(d) for d in function.decorator_list] == [DECORATOR]
]
pytestmark = pytest.mark.ros
TIMEOUT_S = 1200.0  # a loaded machine is slow
# Most of a case is waiting, so these run beside each other, each group in a network of its own.
LONG = ("transitions_in_any_order", "a_publisher_at_ten_times_the_rate", "killed_and_started_again")
GROUPS = (LONG, [name for name in NAMES if name not in LONG][::2], [name for name in NAMES if name not in LONG][1::2])


@pytest.fixture(scope="session")
def said(toy_bundle: Path) -> dict[str, dict[str, str]]:
    """What went wrong, by case."""
    interpreter()  # made once, before several want it
    with ThreadPoolExecutor(len(GROUPS)) as pool:
        every = list(
            pool.map(lambda names: run("tests.ros2.cases", str(toy_bundle), *names, timeout=TIMEOUT_S), GROUPS)
        )
    actual: dict[str, dict[str, str]] = {}
    for done in every:
        assert done.stdout.strip(), done.stderr[-3000:]
        print(done.stderr)
        actual |= json.loads(done.stdout.splitlines()[-1])
    return actual


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, said: dict[str, dict[str, str]]) -> None:
    assert said[name]["problem"] == "", said[name]["problem"]
