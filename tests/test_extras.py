"""What errors and reports say of installing extras: true of a checkout, and of extras that there are."""

from __future__ import annotations

import re
import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from densegeo.extras import install_command, install_hint
from tests.support.project import ROOT

CALL = re.compile(r"""install_(?:hint|command)\(["']([\w-]+)["'](?:, ["']([\w-]+)["'])?""")
FOLDERS = ("benchmarks", "calibration", "densegeo", "export", "kernels", "models", "runtime", "serving")


def test_a_hint_says_what_to_type_and_where() -> None:
    assert install_command("kernels", "export") == 'pip install ".[kernels,export]"'
    assert install_hint("gpu", beside="tensorrt") == 'pip install ".[gpu]" tensorrt in densegeo\'s checkout'


def test_hints_name_extras_that_there_are() -> None:
    """And none asks the package index for densegeo, which is not there."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named: set[str] = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            named |= {name for call in CALL.findall(text) for name in call if name}
            assert not re.search(r"pip install ['\"]?densegeo", text), path
    assert len(named) > 8
    assert named <= extras
