"""Images per second of one process of `densegeo infer`, and of 1, 2 and 4 actors with `--ray local`, a thread each.

    python benchmarks/fleet.py --count 48 --json out/fleet.json

Of each run: images per second between the results that lie on disk (their times of change), once every process has
delivered one, and seconds until then, which are what starting costs. The photographs are densegeo's three, shifted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from densegeo.benchmarks.environment import environment

ACTORS = (1, 2, 4)


def photographs(folder: Path, count: int) -> None:
    """JPEG files of densegeo's photographs, every one another."""
    folder.mkdir(parents=True)
    sources = sorted(path for path in Path(str(files("densegeo") / "photographs")).iterdir() if path.suffix == ".jpg")
    for index in range(count):
        with Image.open(sources[index % len(sources)]) as image:
            pixels = np.roll(np.asarray(image.convert("RGB")), 8 * (index // len(sources)), axis=1)
        Image.fromarray(pixels).save(folder / f"{index:03d}.jpg", quality=92)


def rate(out: Path, processes: int, started: float) -> tuple[float, float]:
    """Images per second, and seconds until every process had delivered one."""
    times = sorted(path.stat().st_mtime for path in out.rglob("*_geometry.json"))
    return (len(times) - processes) / (times[-1] - times[processes - 1]), times[processes - 1] - started


def run(bundle: str, photos: Path, out: Path, actors: int | None) -> dict[str, Any]:
    """One run's record. actors: None without Ray."""
    command = [sys.executable, "-m", "densegeo", "infer", bundle, str(photos), "-o", str(out), "--format", "npz"]
    command += ["--workers", "1", "--threads", "1", "--quiet"]
    command += [] if actors is None else ["--ray", "local", "--actors", str(actors)]
    started = time.time()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    images, first = rate(out, actors or 1, started)
    return {"actors": actors, "images_per_second": round(images, 3), "first_after_s": round(first, 1)}


def main() -> None:
    """Print each run; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="fe2e-tiny")
    parser.add_argument("--count", type=int, default=48, help="photographs")
    parser.add_argument("--actors", type=int, nargs="*", default=list(ACTORS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder) / "photos", options.count)
        for actors in (None, *options.actors):
            out = Path(folder) / f"out-{actors}"
            rows.append(run(options.bundle, Path(folder) / "photos", out, actors))
            print("one process:" if actors is None else f"{actors} actors:", rows[-1], flush=True)
    machine = environment(("onnxruntime", "ray"))
    line = json.dumps({"bundle": options.bundle, "images": options.count, "rows": rows, "environment": machine})
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
