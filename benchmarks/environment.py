"""What a measurement was taken on: machine, versions, commit and command, for every benchmark's JSON; and its file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from densegeo.files import atomic_write


def environment(distributions: Iterable[str]) -> dict[str, Any]:
    """Machine, versions of `distributions` (those installed), commit of this checkout and the command line."""
    from densegeo.backends import installed_version
    from densegeo.doctor import examine

    report = examine()
    versions = {name: installed_version(name) for name in ("densegeo", *distributions)}
    return {
        "machine": {
            "cpu": report.cpu,
            "cpu_features": report.cpu_features,
            "cpu_count": report.cpu_count,
            "memory_bytes": report.memory_bytes,
            "gpus": report.gpus,
            "platform": report.platform,
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "versions": {"python": platform.python_version()} | {k: v for k, v in versions.items() if v is not None},
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def commit() -> str | None:
    """The commit of the checkout this file lies in, marked when tracked files have changes; None outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, value: object) -> None:
    """Indented JSON; a reader never sees half a file."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")
