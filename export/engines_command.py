"""`densegeo engines`: engines for a GPU, made from a bundle alone. Needs neither torch nor onnx nor the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from densegeo.architectures import names
from densegeo.arguments import Bundle
from densegeo.backends import ENGINES
from densegeo.errors import ConfigError
from densegeo.export.engine_builder import EngineOptions
from densegeo.export.engine_flags import (
    Builder,
    EngineTimeout,
    MemoryGib,
    OptimizationLevel,
    VersionCompatible,
    Weights,
    WeightStreaming,
    WorkspaceMib,
)
from densegeo.export.machine import first_gpu
from densegeo.export.renewal import Renewed, renew
from densegeo.export.trial import try_out
from densegeo.inspection import amount
from densegeo.runtime.bundle import read_manifest


def engines(
    bundle: Bundle,
    gpu_arch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--gpu-arch", help="For this architecture: 89 is sm_89 (repeatable). Default: the GPU here."),
    ] = None,
    kernels_only: Annotated[
        bool,
        typer.Option("--kernels-only", help="Only the GPU kernels around the engines, for a machine without Triton."),
    ] = False,
    builder: Builder = "auto",
    weights: Weights = "auto",
    workspace_mib: WorkspaceMib = None,
    optimization_level: OptimizationLevel = None,
    weight_streaming: WeightStreaming = False,
    version_compatible: VersionCompatible = False,
    engine_timeout: EngineTimeout = 7200,
    memory_gib: MemoryGib = None,
) -> None:
    """Add or renew the TensorRT engines of a bundle, from its own graphs and weights."""
    read_manifest(bundle)
    console, gpu = Console(), first_gpu()
    architectures = tuple(dict.fromkeys(gpu_arch or ([gpu.architecture] if gpu is not None else [])))
    if not architectures:
        raise ConfigError("no GPU was found here: name the one that the engines are for, --gpu-arch 89 for sm_89")
    options = EngineOptions(
        library=builder,
        weights=weights,  # type: ignore[arg-type]  # checked by validated()
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        weight_streaming=weight_streaming,
        version_compatible=version_compatible,
        timeout_s=engine_timeout,
        memory_gib=memory_gib,
    )
    renewed = renew(bundle, architectures, None if kernels_only else options, console)
    _report(bundle, renewed, architectures, console)
    if renewed.added and gpu is not None and gpu.architecture in architectures:
        try_out(bundle, ENGINES.name, console)


def _report(bundle: Path, renewed: Renewed, architectures: tuple[int, ...], console: Console) -> None:
    """What the bundle has now, and what to do next."""
    if not renewed.added and not renewed.kernels:
        console.print(
            f"{bundle} has all that was asked for {names(architectures)}, made of these graphs and weights with these "
            "options. Nothing to do.",
            soft_wrap=True,
        )
        return
    table = Table(show_edge=False)
    for column in ("engine", "for", "weights", "size", "built in"):
        table.add_column(column, justify="right" if column in ("size", "built in") else "left")
    for engine in renewed.added:
        table.add_row(
            f"{engine.stage} {engine.bucket}",
            ", ".join(engine.architectures),
            engine.weights,
            amount(renewed.manifest.files[engine.file].bytes, "B"),
            f"{engine.seconds:.1f} s",
        )
    if renewed.added:
        console.print(table)
    unchanged = len(renewed.manifest.engines) - len(renewed.added)
    console.print(
        f"{bundle}: {len(renewed.added)} engines added, {len(renewed.replaced)} replaced by them, {unchanged} kept; "
        f"{len(renewed.kernels)} kernels compiled",
        soft_wrap=True,
        highlight=False,
    )
    if renewed.added:
        console.print(
            f"Nothing has run them yet: `densegeo verify {bundle} --backend {ENGINES.name}` on the GPU tells whether "
            "the numbers come out right; `densegeo inspect --layers` shows what TensorRT made.",
            soft_wrap=True,
            highlight=False,
        )
