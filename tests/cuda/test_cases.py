"""The cases of `former_faults.py`, `counts.py` and `sessions.py`, each a test; they run in one child process."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.cuda.conftest import Child
from tests.support.shared import Build, Once

DECORATOR = "case"
NAMES = [  # the modules themselves are for the stand-in driver's process
    function.name
    for module in ("former_faults", "counts", "sessions")
    for function in ast.parse((Path(__file__).parent / f"{module}.py").read_text()).body
    if isinstance(function, ast.FunctionDef) and [ast.unparse(d) for d in function.decorator_list] == [DECORATOR]
]
pytestmark = [pytest.mark.integration, pytest.mark.thorough]


@pytest.fixture(scope="session")
def said(once: Once, child: Child, with_engines: Build) -> dict[str, str]:
    """What went wrong, by case."""
    bundle = with_engines("fe2e")

    def run(folder: Path) -> None:
        done = child("-m", "tests.cuda.case", bundle)
        (folder / "said.json").write_text(done.stdout.splitlines()[-1] if done.stdout.strip() else "{}")
        (folder / "errors.txt").write_text(done.stderr)

    folder = once("standin-cases", run)
    actual: dict[str, str] = json.loads((folder / "said.json").read_text())
    assert actual, (folder / "errors.txt").read_text()[-3000:]
    return actual


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, said: dict[str, str]) -> None:
    assert said[name] == "", said[name]
