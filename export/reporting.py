"""What a build shows: its progress, and at the end what was made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from densegeo.runtime.bundle import Manifest
from densegeo.runtime.measured import advice


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Steps done of all, with the time they took and will take."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


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


def report(manifest: Manifest, output: Path, console: Console) -> None:
    """What was built, and how far it is from its reference."""
    for check in manifest.verification.checks:
        console.print(
            f"  {check.bucket} {check.output:<12} error {check.error:.1e}  bound {check.bound:.1e}  "
            f"against {check.reference}",
            highlight=False,
            soft_wrap=True,
        )
    size = sum(file.bytes for file in manifest.files.values())
    console.print(f"built {output}: {manifest.model}, {manifest.precision}, {size / 1e6:.1f} MB", soft_wrap=True)
    if manifest.weights_note:
        console.print(f"[yellow]{manifest.weights_note}[/yellow]", soft_wrap=True)
    if manifest.base == "bf16":
        console.print(
            "[yellow]ONNX Runtime's CPU provider cannot run bf16: without a GPU, densegeo\\[openvino] or "
            "densegeo\\[torch] runs this bundle.[/yellow]",
            soft_wrap=True,
        )
    recommend(manifest, console)
