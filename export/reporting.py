"""What a build shows at its end: what was made."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console

from densegeo.backends import BACKENDS, ENGINES, without_convolutions
from densegeo.export.engine_plan import DevicePlan
from densegeo.export.machine import GIB
from densegeo.runtime.bundle import Manifest
from densegeo.runtime.measured import advice


def recommend(manifest: Manifest, console: Console) -> None:
    """Which precision was the fastest here, where `densegeo bench` found out."""
    lines = advice(manifest)
    for line in lines:
        console.print(line, soft_wrap=True)
    if not lines and manifest.target_architectures:
        console.print(
            "No precision is recommended: `densegeo bench` has not yet timed 8 bits and floats on this machine.",
            soft_wrap=True,
        )


def report(manifest: Manifest, output: Path, needed: DevicePlan, console: Console) -> None:
    """What was built: where it lies, what runs it, its sizes, its errors in words, and how to use it.

    needed: on a GPU, of the bundle's largest bucket.
    """
    size = sum(file.bytes for file in manifest.files.values())
    lines = (
        f"built {output}: {manifest.model}, {manifest.precision}, {size / 1e6:.1f} MB on disk",
        f"runs with: {', '.join(runs_with(manifest))}",
        f"on a GPU: about {needed.total / GIB:.1f} GiB, of which {needed.weights / GIB:.2g} GiB are weights",
        f"errors against PyTorch in float32, on seeded pictures: {errors_in_words(manifest)}",
        "use it:",
        "    from densegeo import Estimator",
        f'    geometry = Estimator("{output}")("photo.jpg")',
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if manifest.weights_note:
        console.print(f"[yellow]{manifest.weights_note}[/yellow]", soft_wrap=True)
    recommend(manifest, console)


def runs_with(manifest: Manifest) -> list[str]:
    """The backends that can run a bundle, its own first."""
    engines = sorted({name for engine in manifest.engines for name in engine.architectures or ["Ampere and later"]})
    chosen = "" if manifest.choice is None else manifest.choice.backend
    names = [f"{ENGINES.name} ({', '.join(engines)})"] if engines else []
    convolutions = manifest.quantization is not None and bool(manifest.quantization.convolutions)
    for row in BACKENDS:
        if convolutions and without_convolutions(row):
            continue
        proven = row is not ENGINES and (not row.verified_only or row.name == chosen)
        if proven and row.lacking(manifest.precision, manifest.base) is None:
            names.append(row.name)
    return sorted(names, key=lambda name: name.partition(" ")[0] != chosen) if chosen in names else names


def errors_in_words(manifest: Manifest) -> str:
    """The largest error of depth in percent of the prediction, and of normals in degrees; root mean squares."""
    worst: dict[str, float] = {}
    for check in manifest.verification.checks:
        worst[check.output] = max(check.error, worst.get(check.output, 0.0))
    words = []
    if "prediction" in worst:
        words.append(f"depth off by {100 * worst['prediction']:.2g} %")
    if "normals" in worst:  # of unit vectors: |a - b| = 2 sin(angle / 2)
        degrees = math.degrees(2 * math.asin(min(1.0, worst["normals"] / 2)))
        words.append(f"normals by {degrees:.2g} degrees")
    return ", ".join(words)
