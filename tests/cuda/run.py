"""The tensorrt backend over the stand-in driver: python tests/cuda/run.py SCHEDULE BUNDLE [--mutate NAME]

SCHEDULE: lazy (work is done when it is waited for), eager, or random:SEED; several with commas between them.
BUNDLE: one that was built with --backend tensorrt --gpu-arch 89. The last line is JSON; the exit status is 1 when it
names failures or problems. --mutate makes a deliberate fault (mutations.py), which must be noticed. `--mutate all`
makes each by itself, prints a table, and has status 0 when all were noticed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: it is not where imports start

from tests.cuda import library  # noqa: E402

if TYPE_CHECKING:
    from tests.cuda.exercise import Setup

CHILD = "DENSEGEO_STANDIN_CHILD"
LONGEST_S = 240


def main() -> int:
    arguments = parse()
    if CHILD in os.environ:
        return child(arguments)
    environment = {**library.environment(), CHILD: "1"}
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:]]
    last = ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for last in process.stdout or ():
            print(last, end="", flush=True)
    if process.returncode not in (0, 1) or not last.startswith("{"):  # it crashed, or was ended
        print(json.dumps({"failures": [f"the process ended with {process.returncode}"], "problems": []}))
        return 1
    return process.returncode


def parse() -> argparse.Namespace:
    """The command line; a wrong one ends here with status 2."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").partition(": ")[2].partition("\n")[0])
    parser.add_argument("schedule", metavar="SCHEDULE")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--mutate", metavar="NAME")
    arguments = parser.parse_args()
    for schedule in arguments.schedule.split(","):
        if not re.fullmatch(r"lazy|eager|random:\d+", schedule):
            parser.error(f"there is no schedule {schedule!r}: say lazy, eager or random:SEED")
    if lacking := library.missing():
        parser.error(f"the stand-in driver cannot be built: {lacking}")
    from tests.cuda.bundles import unusable
    from tests.cuda.mutations import MUTATIONS

    if reason := unusable(arguments.bundle):
        parser.error(reason)
    if arguments.mutate not in (None, "all", *MUTATIONS):
        parser.error(f"there is no mutation {arguments.mutate!r}: there are {', '.join(MUTATIONS)}, and all")
    return arguments


def child(arguments: argparse.Namespace) -> int:
    """In the process whose driver is the stand-in."""
    import torch

    from tests.cuda.exercise import staged
    from tests.cuda.mutations import MUTATIONS

    torch.set_num_threads(1)
    schedules = arguments.schedule.split(",")
    with staged(arguments.bundle) as setup:
        if arguments.mutate == "all":
            return table(setup, schedules)
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        if arguments.mutate:
            MUTATIONS[arguments.mutate]()
        said = run(setup, schedules, arguments.mutate)
    print(json.dumps(said))
    return int(bool(said["failures"] or said["problems"]))


def run(setup: Setup, schedules: list[str], mutation: str | None) -> dict[str, Any]:
    """Every schedule by itself; what they say together, each line with its schedule where there are several."""
    from tests.cuda.exercise import exercise

    outcomes = {schedule: exercise(setup, schedule) for schedule in schedules}
    worst = max(one.worst_error for one in outcomes.values())
    named = "{1}" if len(schedules) == 1 else "{0}: {1}"
    return {
        "failures": [named.format(how, text) for how, one in outcomes.items() for text in one.failures],
        "problems": [named.format(how, text) for how, one in outcomes.items() for text in one.problems],
        "misaligned": sum(one.misaligned for one in outcomes.values()),
        "worst_error": worst if math.isfinite(worst) else None,
        "launches": sum(one.launches for one in outcomes.values()),
        "mutation": mutation,
    }


def table(setup: Setup, schedules: list[str]) -> int:
    """Every mutation in a process of its own, forked here where libraries are loaded and the driver is not started."""
    from tests.cuda.mutations import MUTATIONS

    print(f"| mutation ({', '.join(schedules)}) | failures | problems | the first |", "|---|---|---|---|", sep="\n")
    unnoticed = []
    for name, mutate in MUTATIONS.items():
        said = forked(lambda mutate=mutate, name=name: (mutate(), run(setup, schedules, name))[1])
        failures, problems = said["failures"], said["problems"]
        print(f"| {name} | {len(failures)} | {len(problems)} | {[*problems, *failures, ''][0]} |", flush=True)
        if not failures and not problems:
            unnoticed.append(f"{name} was not noticed")
    print(json.dumps({"failures": unnoticed, "problems": [], "mutation": "all"}))
    return int(bool(unnoticed))


def forked(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns in a copy of this process."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        try:
            faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            with os.fdopen(writer, "w") as pipe:
                json.dump(call(), pipe)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    return json.loads(text) if text else {"failures": [f"the process ended with {status}"], "problems": []}


if __name__ == "__main__":
    sys.exit(main())
