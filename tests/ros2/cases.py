"""What the node must do; a node and its client are two processes.

python -m tests.ros2.cases BUNDLE [NAME...] prints, as JSON, what went wrong in which.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.ros2 import life, results
from tests.ros2.common import CASES, MEASUREMENTS

MODULES = (life, results)  # they fill CASES


def main() -> None:
    bundle, *names = sys.argv[1:]
    said: dict[str, dict[str, Any]] = {}
    for name in names or CASES:
        start, problem = time.monotonic(), ""
        try:
            {**CASES, **MEASUREMENTS}[name](Path(bundle))
        except Exception:
            problem = traceback.format_exc()
        said[name] = {"problem": problem, "seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {'failed' if problem else 'passed'} in {said[name]['seconds']} s", file=sys.stderr)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
