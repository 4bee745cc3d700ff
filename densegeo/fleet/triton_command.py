"""`densegeo export-triton`: a bundle as a model of Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape

from densegeo.arguments import Backend, Bundle, Whole, above_zero, known_device, not_negative
from densegeo.errors import ConfigError
from densegeo.fleet.triton_model import InstanceOptions
from densegeo.fleet.triton_repository import Deployment, export
from densegeo.progress import progress
from densegeo.runtime.bundle import read_manifest
from densegeo.serving.models import given_name, model_name
from densegeo.serving.options import MAX_PIXELS


def _devices(devices: list[str]) -> list[str]:
    return [known_device(device) for device in devices]


def export_triton(
    bundle: Bundle,
    repository: Annotated[Path, typer.Argument(help="Folder of the model repository; made when missing.")],
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The model's name; by default the bundle's folder's."),
    ] = None,
    version: Annotated[Whole, typer.Option(min=1, help="Of the model; by default the next.")] = None,
    device: Annotated[
        list[str],
        typer.Option(
            callback=_devices,
            help="auto (all GPUs that Triton sees, else the CPU), cpu, cuda (all GPUs) or cuda:N; repeat the last.",
        ),
    ] = ["auto"],  # noqa: B006  (typer reads it, nobody writes it)
    instances: Annotated[int, typer.Option(min=1, help="Processes a device; each has the bundle in memory.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Images that are handed over together.")] = 8,
    max_wait_ms: Annotated[
        float, typer.Option(callback=not_negative, help="How long the first of them waits for others.")
    ] = 0.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 64,
    keep: Annotated[int, typer.Option(min=1, help="Versions that are served: the newest.")] = 1,
    backend: Backend = "auto",
    threads: Annotated[
        Whole, typer.Option(min=1, help="Of the CPU, for each instance; by default the backend's library decides.")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(callback=above_zero, help="Seconds for one run; an instance that takes longer ends."),
    ] = 60.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of an image; larger ones are refused.")] = MAX_PIXELS,
    replace_config: Annotated[
        bool, typer.Option("--replace-config", help="Replace a config.pbtxt that says something else.")
    ] = False,
) -> None:
    """Put a bundle into a model repository of Triton Inference Server, as its newest version.

    Triton's Python needs densegeo too, with the extra of a backend.
    """
    try:
        model = model_name(bundle) if name is None else given_name(name)
        options: dict[str, Any] = {"backend": backend, "threads": threads, "timeout_s": timeout}
        deployment = Deployment(
            devices=device,
            instances=instances,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            max_queue=max_queue,
            keep=keep,
            options=InstanceOptions(**options, max_pixels=max_pixels),
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(stderr=True)
    with progress("files", len(read_manifest(bundle).files) + 1, console) as advance:
        exported = export(
            bundle,
            repository,
            model,
            deployment,
            version=version,
            replace_config=replace_config,
            advance=advance,
        )
    outcome = "wrote" if exported.fresh else "this bundle is there already:"
    typer.echo(f"{outcome} {exported.path}")
    if exported.configured and not exported.fresh:
        typer.echo("its configuration was written anew")
    console.print(
        f"serve it: tritonserver --model-repository {escape(str(repository))} (its Python needs densegeo)",
        soft_wrap=True,
        highlight=False,
    )
