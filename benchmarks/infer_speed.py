"""Two checkouts' `densegeo infer` over the same photographs, run by turns: wall and processor time of each.

    python benchmarks/infer_speed.py --old CHECKOUT BUNDLE --new CHECKOUT BUNDLE --runs 3

Each bundle is the one that its checkout built (`densegeo build --model fe2e-tiny --precision bf16 --backend openvino`).
The photographs are densegeo's three, enlarged to 1920x1080 and shifted, as JPEG.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from densegeo.benchmarks.environment import environment

SIZE = (1920, 1080)


def photographs(folder: Path, count: int) -> None:
    """JPEG files of full HD with the grain of a camera."""
    folder.mkdir(parents=True)
    sources = sorted(path for path in Path(str(files("densegeo") / "photographs")).iterdir() if path.suffix == ".jpg")
    for index in range(count):
        with Image.open(sources[index % len(sources)]) as image:
            large = image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
        pixels = np.roll(np.asarray(large, dtype=np.float32), 80 * (index // len(sources)), axis=1)
        grain = np.random.default_rng(index).normal(0, 3, (*pixels.shape[:2], 1))
        Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(folder / f"{index:02d}.jpg", quality=92)


def run(checkout: str, bundle: str, photos: Path, out: Path, formats: str) -> tuple[float, float]:
    """Seconds that went by, and processor seconds."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "densegeo", "infer", bundle, str(photos), "-o", str(out)]
    before, started = os.times(), time.monotonic()
    subprocess.run(
        [*command, "--backend", "openvino", "--format", formats],
        check=True,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": checkout},
        cwd=photos.parent,
    )
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return time.monotonic() - started, used


def main() -> None:
    """Print each run, the medians and their ratio; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", nargs=2, required=True, metavar=("CHECKOUT", "BUNDLE"))
    parser.add_argument("--new", nargs=2, required=True, metavar=("CHECKOUT", "BUNDLE"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--count", type=int, default=24, help="photographs")
    parser.add_argument("--format", default="npy,png")
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"old": [], "new": []}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photographs(photos, options.count)
        for _ in range(options.runs):
            for name, runs in times.items():
                checkout, bundle = getattr(options, name)
                runs.append(run(checkout, bundle, photos, Path(folder) / "out", options.format))
                print(f"{name}: {runs[-1][0]:.2f} s, {runs[-1][1]:.2f} s of the processors", flush=True)
    medians = {
        name: [statistics.median(pair[kind] for pair in runs) for kind in (0, 1)] for name, runs in times.items()
    }
    wall, used = (medians["old"][kind] / medians["new"][kind] for kind in (0, 1))
    print(f"{wall:.2f} times as fast, {used:.2f} times less processor time")
    where = environment(("numpy", "openvino", "pillow"))
    print(json.dumps({"runs": times, "medians": medians, "wall": wall, "processor": used, "where": where}))


if __name__ == "__main__":
    main()
