"""Which extra can be installed on which Python and platform, asked of the public package index.

`make resolve` (`python -m tests.resolution`) resolves every extra under constraints.txt with uv, from wheels alone and
without the machine's own indexes and wheels, and prints a table. It fails where an extra should resolve and does not,
where a known exception resolves after all, and where a package would be installed that constraints.txt does not pin.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# With the C library of RHEL 8, and of JetPack 6 (Ubuntu 22.04): later ones take the same wheels.
PLATFORMS = {"x86_64": "x86_64-manylinux_2_28", "aarch64": "aarch64-manylinux_2_35"}
# Published as a source archive, of Python files alone: nothing is compiled. What it loads comes in two wheels.
NO_WHEEL_NEEDED = ("tensorrt-rtx-cu13",)


class Cell(NamedTuple):
    """One field of the table."""

    extra: str
    python: str
    machine: str


class Missing(NamedTuple):
    """Why an extra cannot be installed on some Pythons of one kind of machine."""

    extras: tuple[str, ...]
    machine: str
    pythons: tuple[str, ...]
    reason: str


EXCEPTIONS: tuple[Missing, ...] = (
    Missing(("gpu",), "aarch64", ("3.10",), "onnxruntime-gpu has no aarch64 wheel for Python 3.10: use [tensorrt]"),
)


def project() -> dict[str, Any]:
    """pyproject.toml's [project]: what is installed may be older."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def reason_against(cell: Cell) -> str | None:
    """Why this extra is known not to resolve there, or None."""
    known = (
        row.reason
        for row in EXCEPTIONS
        if cell.extra in row.extras and cell.machine == row.machine and cell.python in row.pythons
    )
    return next(known, None)


def pinned() -> set[str]:
    """The names in constraints.txt, normalised."""
    lines = CONSTRAINTS.read_text().splitlines()
    return {normal(line.partition("==")[0]) for line in lines if not line.lstrip().startswith("#")}


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).strip().lower()


def resolve(wanted: Iterable[str], python: str, machine: str) -> str | None:
    """Resolve these extras together; None when that works with nothing but pinned packages, or what is wrong."""
    command = [sys.executable, "-m", "uv", "--no-config", "pip", "compile", "--quiet", "--no-python-downloads"]
    command += ["--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += [part for name in NO_WHEEL_NEEDED for part in ("--no-binary", name)]
    command += ["--constraints", str(CONSTRAINTS), "--python-version", python, "--python-platform", PLATFORMS[machine]]
    command += [part for extra in wanted for part in ("--extra", extra)]
    public = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "PIP_"))}
    done = subprocess.run(
        [*command, "pyproject.toml"], capture_output=True, text=True, cwd=ROOT, env=public, check=False
    )
    if done.returncode:
        return " ".join(done.stderr.split())
    names = {normal(line.partition("==")[0]) for line in done.stdout.splitlines() if line}
    loose = sorted(names - pinned())
    return f"not pinned in constraints.txt: {', '.join(loose)}" if loose else None


def examine(python: str, machine: str, names: Sequence[str]) -> dict[Cell, str]:
    """What is wrong with each field of one column; empty when all is as expected.

    Extras that resolve together also do so one by one, because every version is pinned; so one question is enough until
    the answer is no.
    """
    cells = [Cell(name, python, machine) for name in names]
    expected = [cell for cell in cells if reason_against(cell) is None]
    wrong: dict[Cell, str] = {}
    together = resolve([cell.extra for cell in expected], python, machine)
    if together is not None:
        answers = {cell: resolve([cell.extra], python, machine) for cell in expected}
        wrong = {cell: answer for cell, answer in answers.items() if answer is not None}
        wrong = wrong or {expected[0]: f"each extra alone resolves, but not all together: {together}"}
    for cell in cells:
        if cell not in expected and resolve([cell.extra], python, machine) is None:
            wrong[cell] = "resolves: take it out of EXCEPTIONS"
    return wrong


def table(names: Sequence[str], wrong: dict[Cell, str]) -> str:
    """A row for each extra, a column for each Python of each platform."""
    columns = [(machine, python) for machine in PLATFORMS for python in PYTHONS]
    wide = max(len(name) for name in names)
    headings = [f"{machine if python == PYTHONS[0] else '':>9}" for machine, python in columns]
    lines = [" " * wide + "".join(headings), " " * wide + "".join(f"{python:>9}" for _, python in columns)]
    for name in names:
        cells = [Cell(name, python, machine) for machine, python in columns]
        marks = ["WRONG" if cell in wrong else "-" if reason_against(cell) else "yes" for cell in cells]
        lines.append(f"{name:{wide}}" + "".join(f"{mark:>9}" for mark in marks))
    for row in EXCEPTIONS:
        lines.append(f"- {', '.join(row.extras)} on {row.machine}, Python {', '.join(row.pythons)}: {row.reason}")
    return "\n".join(lines)


def main() -> int:
    """Ask for every column, eight at a time; print the table and what is wrong."""
    names = list(project()["optional-dependencies"])
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(examine, python, machine, names) for machine in PLATFORMS for python in PYTHONS]
        wrong = {cell: answer for future in asked for cell, answer in future.result().items()}
    print(table(names, wrong))
    for cell, answer in wrong.items():
        print(f"[{cell.extra}] on Python {cell.python}, {cell.machine}: {answer}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
