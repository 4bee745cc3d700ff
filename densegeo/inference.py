"""`densegeo infer`: many images through one estimator; images that cannot be read are reported, the rest goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from densegeo.errors import CalibrationError, ConfigError, ImageError, ResourceError
from densegeo.inputs import find_images, unique_stems
from densegeo.runtime import Estimator, Geometry


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `densegeo infer --help`."""

    bundle: Path
    inputs: Sequence[str]
    output: Path
    formats: tuple[str, ...]
    fit: Any
    preprocessing: Any
    depth_range: tuple[float, float] | None  # metres: near, far
    scale_shift: tuple[float, float] | None
    intrinsics: tuple[float, float, float, float] | None  # pixels: fx, fy, cx, cy
    backend: str
    device: str


def run(options: Options) -> int:
    """Work through all images and print a summary; returns how many failed.

    Raises other densegeo errors at once: they would hit every image alike.
    """
    if options.depth_range and options.scale_shift:
        raise ConfigError("Give either --near and --far or --scale and --shift, not both.")
    if options.depth_range and not 0 < options.depth_range[0] < options.depth_range[1] < math.inf:
        raise ConfigError("--near and --far must be metres with 0 < near < far.")
    if not options.formats:
        raise ConfigError("--format names no format; try --format npy,png.")
    images = find_images(options.inputs)
    failures: list[tuple[Path, str]] = []
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with Estimator(
            options.bundle, options.backend, options.device, fit=options.fit, preprocessing=options.preprocessing
        ) as estimator:
            _work(estimator, images, options, failures)
    except OSError as error:
        raise ResourceError(f"Cannot write to {options.output}: {error.strerror or error}.") from error
    done = len(images) - len(failures)
    console = Console(stderr=True)
    console.print(f"{done} of {len(images)} images done, results in {escape(str(options.output))}", soft_wrap=True)
    for image, reason in failures:
        console.print(f"[red]failed[/] {escape(str(image))}: {escape(reason)}", soft_wrap=True, highlight=False)
    return len(failures)


def _work(estimator: Estimator, images: list[Path], options: Options, failures: list[tuple[Path, str]]) -> None:
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for image, stem in progress.track(list(zip(images, unique_stems(images), strict=True))):
            try:
                geometry = _calibrated(estimator(image), options)
            except (ImageError, CalibrationError) as error:
                failures.append((image, str(error)))
                continue
            geometry.save(options.output, options.formats, stem=stem, intrinsics=options.intrinsics)


def _calibrated(geometry: Geometry, options: Options) -> Geometry:
    """In metres when the command line says how, else as it is."""
    if options.depth_range:
        near, far = options.depth_range
        return geometry.to_metric(near=near, far=far)
    if options.scale_shift:
        scale, shift = options.scale_shift
        return geometry.to_metric(scale=scale, shift=shift)
    return geometry
