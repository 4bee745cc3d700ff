"""GPU kernels of the runtime, compiled ahead of time into a bundle: binaries, and how each is launched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from densegeo.architectures import ARCHITECTURES, names
from densegeo.errors import ConfigError, KernelError
from densegeo.kernels.compile import CONTRACTS
from densegeo.kernels.contract import LaunchContract
from densegeo.runtime.bundle import KERNELS

TIMEOUT_S = 1800


def check_architectures(architectures: Sequence[int]) -> None:
    """Raises ConfigError for an architecture that no kernel is compiled for."""
    if unknown := sorted(set(architectures) - set(ARCHITECTURES)):
        raise ConfigError(
            f"no kernel can be compiled for {names(unknown)}; there are {', '.join(map(str, ARCHITECTURES))}"
        )


def write_cubins(
    directory: Path, architectures: Sequence[int], names: Sequence[str] | None = None
) -> list[LaunchContract]:
    """Compile into `directory`/kernels and return every binary's contract. Raises KernelError.

    names: default all that a bundle may carry; the kernels within the networks belong to the torch backend.
    In a process of its own: a compiler's crash is then an error, and Triton's settings stay out of this one.
    """
    folder = directory / KERNELS
    command = [sys.executable, "-m", "densegeo.kernels.compile", "--output", str(folder)]
    command += ["--architectures", *map(str, architectures), "--bundled"]
    command += ["--names", *names] if names is not None else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise KernelError(f"compiling the kernels took longer than {TIMEOUT_S} s") from None
    if process.returncode:
        why = process.stderr.strip()[-2000:] or f"exit {process.returncode}"
        raise KernelError(f"the kernels cannot be compiled: {why}")
    path = folder / CONTRACTS
    contracts = msgspec.json.decode(path.read_bytes(), type=list[LaunchContract])
    path.unlink()  # the manifest holds them
    return contracts
