"""`densegeo verify` over the stand-in driver: python tests/cuda/command.py BUNDLE [--break STAGE]

BUNDLE: one that run.py takes. The tensorrt backend serves the images. STAGE: several with commas between them are
broken one after the other, and what the command says last of each is printed with its exit status. The status is then 1
when all were noticed, 2 when there is no such stage, and 3 when one was not noticed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from tests.cuda import library  # noqa: E402

CHILD = "DENSEGEO_STANDIN_CHILD"
UNNOTICED = 3


def main() -> int:
    """Start anew with the stand-in as the driver, then put the stand-ins in place and run the command."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").partition(": ")[2].partition("\n")[0])
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--break", dest="stages", metavar="STAGE", default="")
    arguments = parser.parse_args()
    if lacking := library.missing():
        parser.error(f"the stand-in driver cannot be built: {lacking}")
    from tests.cuda.bundles import unusable

    if reason := unusable(arguments.bundle):
        parser.error(reason)
    if CHILD not in os.environ:
        environment = {**library.environment(), CHILD: "1"}
        os.execve(sys.executable, [sys.executable, str(Path(__file__)), *sys.argv[1:]], environment)
    import torch

    from densegeo.cli import main as densegeo
    from tests.cuda.exercise import DEVICE, staged

    torch.set_num_threads(1)
    line = ["verify", str(arguments.bundle), "--backend", "tensorrt", "--device", f"cuda:{DEVICE}"]
    stages = arguments.stages.split(",") if arguments.stages else []
    worst = 0
    with staged(arguments.bundle) as setup:
        setup.driver.schedule("lazy")
        if len(stages) < 2:
            densegeo([*line, *(["--break", *stages] if stages else [])])
        for stage in stages:
            status, last = forked(lambda stage=stage: densegeo([*line, "--break", stage]))
            print(stage, status, last, flush=True)
            worst = max(worst, status if status in (1, 2) else UNNOTICED)
    return worst


def forked(call: object) -> tuple[int, str]:
    """Exit status and last line of a call in a copy of this process, where the driver is not started yet."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        code = 70
        try:
            call()  # type: ignore[operator]
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = [text.strip("│ ") for text in pipe.read().splitlines() if text.strip("╭╰│─╮╯ ")]
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
