"""How engines are built, as it is typed: what `densegeo build` and `densegeo engines` have in common."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from densegeo.backends import ENGINE_LIBRARIES, ENGINES

# `Optional` and not `| None`: typer evaluates these at run time, also on Python 3.10.
PANEL = f"{ENGINES.title} engines (--backend {ENGINES.name})"
Builder = Annotated[
    str,
    typer.Option("--builder", help=f"TensorRT library: auto, {', '.join(ENGINE_LIBRARIES)}.", rich_help_panel=PANEL),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="constant (in the engine), input (bound from the weight file), or auto: constant if the build fits.",
        rich_help_panel=PANEL,
    ),
]
WorkspaceMib = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--workspace-mib", help="Limit of an engine's workspace on the GPU, in MiB.", rich_help_panel=PANEL),
]
OptimizationLevel = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--optimization-level", help="The builder's effort, 0 to 5.", rich_help_panel=PANEL),
]
WeightStreaming = Annotated[
    bool,
    typer.Option("--weight-streaming", help="Let weights stay in host memory at run time.", rich_help_panel=PANEL),
]
VersionCompatible = Annotated[
    bool,
    typer.Option("--version-compatible", help="Engines that later TensorRT versions load too.", rich_help_panel=PANEL),
]
EngineTimeout = Annotated[
    int, typer.Option("--engine-timeout", min=1, help="Seconds one engine may take.", rich_help_panel=PANEL)
]
MemoryGib = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--memory-gib", help="Memory the builder may take; default: 90 % of what is free.", rich_help_panel=PANEL
    ),
]
