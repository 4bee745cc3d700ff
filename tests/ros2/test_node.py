"""The cases of `results.py` and `life.py`, each a test, in the environment with rclpy and a network of its own."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.ros2.environment import run

SOURCES = [Path(__file__).parent / name for name in ("results.py", "life.py")]
DECORATOR = "case"
NAMES = [  # the modules themselves are for that environment
    function.name
    for source in SOURCES
    for function in ast.parse(source.read_text()).body
    if isinstance(function, ast.FunctionDef) and [ast.unparse(d) for d in function.decorator_list] == [DECORATOR]
]
pytestmark = pytest.mark.ros
TIMEOUT_S = 1200.0  # a loaded machine is slow; on a quiet one all take two minutes


@pytest.fixture(scope="session")
def said(toy_bundle: Path) -> dict[str, dict[str, str]]:
    """What went wrong, by case."""
    done = run("tests.ros2.cases", str(toy_bundle), timeout=TIMEOUT_S)
    assert done.stdout.strip(), done.stderr[-3000:]
    print(done.stderr)
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, said: dict[str, dict[str, str]]) -> None:
    assert said[name]["problem"] == "", said[name]["problem"]
