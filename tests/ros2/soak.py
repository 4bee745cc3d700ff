"""The node under ten times its rate for as long as asked, or its latency beside the estimator's:

python -m tests.ros2.soak --seconds 600
python -m tests.ros2.soak --latency       # on a quiet machine
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.ros2.environment import run
from tests.support.project import ROOT
from tests.support.toy_bundle import make_toy_bundle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--latency", action="store_true")
    asked = parser.parse_args()
    seconds = asked.seconds
    name = "latency_is_the_calls" if asked.latency else "a_publisher_at_ten_times_the_rate"
    os.environ["DENSEGEO_SOAK_S"] = str(seconds)
    if asked.latency:
        os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(ROOT / "ros2" / "densegeo_ros" / "config" / "fastdds.xml")
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_toy_bundle(Path(folder) / "toy")
        done = run("tests.ros2.cases", str(bundle), name, timeout=seconds + 300)
    print(done.stderr)
    return 0 if '"problem": ""' in done.stdout else 1


if __name__ == "__main__":
    sys.exit(main())
