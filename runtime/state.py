"""What densegeo remembers about this machine: where that lies, and how the machine is known again."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def folder(kind: str) -> Path:
    """The folder of one kind of record, among the user's state (XDG_STATE_HOME); it need not be there."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "densegeo" / kind


def machine() -> str:
    """Name and NVIDIA driver: after another driver, everything is measured anew."""
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        driver = ""
    return f"{platform.node()}|{driver}"
