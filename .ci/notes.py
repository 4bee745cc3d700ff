"""`python .ci/notes.py v0.1.0`: the changelog's notes on a release, when the tag and the package's version agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(tag: str, changelog: str, version: str) -> str:
    """The section of the tag's version; exits with a sentence where a release would be a mistake."""
    if tag != f"v{version}":
        raise SystemExit(f"The tag is {tag}, and densegeo/__init__.py says {version}.")
    found = re.search(rf"^## {re.escape(version)}(.*)\n((?:(?!## ).*\n?)*)", changelog, re.MULTILINE)
    if found is None or not found[2].strip():
        raise SystemExit(f"CHANGELOG.md says nothing about {version}.")
    if "unreleased" in found[1]:
        raise SystemExit(f"CHANGELOG.md calls {version} unreleased: put the date there.")
    return found[2].strip()


if __name__ == "__main__":
    source = (ROOT / "densegeo" / "__init__.py").read_text(encoding="utf-8")
    (current,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    print(notes(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), current))
