"""The cases of `triton_cases.py`, each a test, in the environment that has tritonserver and tritonclient."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import interpreter
from tests.support.project import ROOT
from tests.support.toy_bundle import make_toy_bundle

CASES = Path(__file__).with_name("triton_cases.py")
LOCK = Path(__file__).with_name("triton-requirements.txt")
NAMES = [  # the module itself is for that environment
    function.name
    for function in ast.parse(CASES.read_text()).body
    if isinstance(function, ast.FunctionDef) and [ast.unparse(d) for d in function.decorator_list] == ["case"]
]
TIMEOUT_S = 600.0  # a loaded machine is slow
pytestmark = pytest.mark.fleet


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What went wrong, by case."""
    folder = tmp_path_factory.mktemp("triton")
    toy = make_toy_bundle(folder / "toy", sizes=((64, 48), (48, 64)))
    command = [str(interpreter("triton", LOCK)), "-m", "tests.fleet.triton_cases", str(toy), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    print(done.stderr)
    assert done.stdout.strip(), done.stderr[-3000:]
    actual: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return actual


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, said: dict[str, dict[str, str]]) -> None:
    assert said[name]["problem"] == "", said[name]["problem"]
