"""Builds the stand-in driver (driver/*.c) against the cuda.h that Triton's wheel carries."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent / "driver"
NAME = "libcuda.so.1"
STANDIN = "DENSEGEO_STANDIN"
FLAGS = ["-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]


def missing() -> str:
    """What a build lacks here, or nothing."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    return "" if header_folder() else "Triton, whose wheel carries cuda.h, is not installed"


def header_folder() -> Path | None:
    """The folder of Triton's cuda.h."""
    actual = find_spec("triton")
    if actual is None or actual.origin is None:
        return None
    folder = Path(actual.origin).parent / "backends/nvidia/include"
    return folder if (folder / "cuda.h").is_file() else None


def build(folder: Path) -> Path:
    """Compile into `folder`; the library's path."""
    header = header_folder()
    assert header is not None
    target = folder / NAME
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = ["gcc", *FLAGS, f"-I{header}", f"-Wl,-soname,{NAME}", "-o", str(target), *sources, "-lpthread"]
    subprocess.run(command, check=True)
    return target


def built() -> Path:
    """The library that STANDIN names the folder of; else that of these sources, from an earlier call or built now."""
    if STANDIN in os.environ:
        return Path(os.environ[STANDIN]) / NAME
    digest = hashlib.sha256(repr((FLAGS, str(header_folder()))).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    place = Path(tempfile.gettempdir()) / f"densegeo-standin-{os.getuid()}-{digest.hexdigest()[:16]}"
    if not (place / NAME).is_file():
        place.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            os.replace(build(Path(folder)), place / NAME)  # another process may do the same
    return place / NAME


def environment() -> dict[str, str]:
    """Of a process that gets the stand-in for its driver."""
    paths = [str(built().parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
