"""The release notes come from the changelog, and only for a tag that is the package's version."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from densegeo import __version__

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "notes.py"
CHANGELOG = """# Changelog

## 0.2.0 (2026-01-31)

- Faster.
- Smaller.

## 0.1.0 (unreleased)

- First.

## 0.0.1 (2025-12-24)
"""


@pytest.fixture(scope="module")
def script() -> Any:
    spec = spec_from_file_location("notes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notes_are_the_section_of_the_version(script: Any) -> None:
    assert script.notes("v0.2.0", CHANGELOG, "0.2.0") == "- Faster.\n- Smaller."


@pytest.mark.parametrize(
    ("tag", "version", "reason"),
    [
        ("v0.2.0", "0.3.0", "The tag is v0.2.0"),
        ("v0.3.0", "0.3.0", "says nothing"),
        ("v0.0.1", "0.0.1", "says nothing"),
        ("v0.1.0", "0.1.0", "unreleased"),
    ],
)
def test_a_mistaken_release_stops(script: Any, tag: str, version: str, reason: str) -> None:
    with pytest.raises(SystemExit, match=reason):
        script.notes(tag, CHANGELOG, version)


def test_the_script_reads_this_version() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "v0.0.0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"The tag is v0.0.0, and densegeo/__init__.py says {__version__}."
