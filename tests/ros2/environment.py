"""The environment of the node's tests: Python with rclpy, made once from the lock file, in a network of its own.

`python -m tests.ros2.environment` makes it and prints its interpreter.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from densegeo.files import cache_directory
from tests.support.project import ROOT

LOCK = ROOT / "ros2" / "test-requirements.txt"
PATHS = (ROOT, ROOT / "ros2" / "densegeo_ros")


def interpreter() -> Path:
    """Of the environment of this lock file and this Python; made when it is missing, whole or not at all."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(LOCK.read_bytes() + python.encode()).hexdigest()[:12]
    folder = cache_directory() / f"ros-{key}"
    with (folder.parent / f"ros-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            uv = [
                shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) or "uv"
            ]
            subprocess.run([*uv, "--no-config", "venv", "--quiet", "--python", sys.executable, folder], check=True)
            target = ["--python", str(folder / "bin" / "python")]
            subprocess.run(
                [*uv, "--no-config", "pip", "sync", "--quiet", "--require-hashes", *target, LOCK], check=True
            )
            (folder / "complete").touch()
    return folder / "bin" / "python"


def run(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """The interpreter with these arguments, in a network namespace of its own that has a loopback device alone."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    alone = ["unshare", "--map-root-user", "--net", "--fork", "--kill-child"]
    command = [*alone, str(interpreter()), "-m", "tests.ros2.alone", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, timeout=timeout, capture_output=True, text=True)


if __name__ == "__main__":
    print(interpreter())
