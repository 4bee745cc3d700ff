"""The environment of the node's tests: Python with rclpy, made once from the lock file, in a network of its own.

`python -m tests.ros2.environment` makes it and prints its interpreter.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import environments
from tests.support.project import ROOT

LOCK = ROOT / "ros2" / "test-requirements.txt"
PATHS = (ROOT, ROOT / "ros2" / "densegeo_ros")


def interpreter() -> Path:
    """Of the environment with rclpy, see `environments.interpreter`."""
    return environments.interpreter("ros", LOCK)


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
