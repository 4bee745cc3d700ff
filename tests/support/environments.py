"""Environments of Python for what does not go together with the suite's own: made once from a lock file, and kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from densegeo.files import cache_directory


def interpreter(name: str, requirements: Path) -> Path:
    """Of the environment of this lock file and this Python; made when it is missing, whole or not at all."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(requirements.read_bytes() + python.encode()).hexdigest()[:12]
    folder = cache_directory() / f"{name}-{key}"
    with (folder.parent / f"{name}-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            uv = [shutil.which("uv", path=path) or "uv", "--no-config"]
            subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
            target = ["--python", str(folder / "bin" / "python")]
            subprocess.run([*uv, "pip", "sync", "--quiet", "--require-hashes", *target, requirements], check=True)
            (folder / "complete").touch()
    return folder / "bin" / "python"
