"""Statistics over many images: one at a time, saved as it goes, and taken up again where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import nn

from densegeo.calibration.layer_inputs import LayerInputs
from densegeo.calibration.statistics import Identity, Statistics, smoothing_factors
from densegeo.errors import ImageError, QuantizationError
from densegeo.models.layer_plans import smoothable
from densegeo.models.rewrites import Pipeline, stage_of
from densegeo.models.vae import AttnBlock
from densegeo.runtime.bundle import STAGES, Bucket, Manifest, sha256_file
from densegeo.runtime.images import load_image
from densegeo.runtime.resample import choose_bucket, place, prepare

MINIMUM = 8  # images; fewer tell too little of what others will do
UNREADABLE = 0.2  # the share of unreadable images from which on the folder is doubted
SAVE_EVERY = 8  # images
Float32 = NDArray[np.float32]
Observe = Callable[[str, Float32], None]


class Images:
    """Calibration images; files of the same bytes count as one. Raises QuantizationError when there are too few."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.digests = {path: _digest(path) for path in paths}
        count = len({digest or str(path) for path, digest in self.digests.items()})
        copies = len(paths) - count
        if count < MINIMUM:
            repeated = f" ({copies} more files hold the same)" if copies else ""
            raise QuantizationError(
                f"{count} image{'s are' if count != 1 else ' is'} too few to calibrate with{repeated}: give at least "
                f"{MINIMUM} different ones, better 64, of what the model will see"
            )
        self.unreadable: list[Path] = []

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def skip(self, path: Path, error: ImageError) -> None:
        """Note an unreadable image. Raises QuantizationError when they are too many."""
        if path not in self.unreadable:
            self.unreadable.append(path)
        if len(self.unreadable) > UNREADABLE * len(self.paths):
            raise QuantizationError(
                f"{len(self.unreadable)} of {len(self.paths)} images cannot be read, the last one: {error}"
            )


def _digest(path: Path) -> str:
    """Of a file's bytes; "" where it cannot be read, which the error of reading it as an image says better."""
    try:
        return sha256_file(path)
    except OSError:
        return ""


def rgb_of(path: Path, manifest: Manifest) -> tuple[Bucket, Float32]:
    """An image as its bucket's input (1, 3, H, W). Raises ImageError."""
    frame = load_image(path)
    bucket = choose_bucket(manifest.buckets, frame.size)
    return bucket, prepare(frame, bucket.size, place(bucket.size, frame.size, "stretch"))


def open_statistics(
    path: Path, identity: Identity, smooth: float | None, otherwise: float, *, attention: bool, convolutions: bool
) -> Statistics:
    """The statistics of the file `path`, which go on where they stopped, or new ones where there are none.

    smooth: SmoothQuant's exponent, 0 for none; None takes that of the file, or `otherwise`. attention, convolutions: of
    attentions, and of convolutions in all networks, too. Raises QuantizationError for statistics of another bundle or
    exponent, or without those.
    """
    if not path.exists():
        exponent = otherwise if smooth is None else smooth
        return Statistics(identity, exponent, attention=attention, convolutions=convolutions)
    statistics = Statistics.load(path)
    check_identity(statistics.identity, identity, path)
    if smooth not in (None, statistics.smooth):
        raise QuantizationError(
            f"{path} was made with --smooth {statistics.smooth:g}. Give another --output for {smooth:g}."
        )
    for required, included, flag in (
        (attention, statistics.attention, "--attention"),
        (convolutions, statistics.convolutions, "--convolutions"),
    ):
        if required and not included:
            raise QuantizationError(f"{path} was made without {flag}. Give another --output.")
    return statistics


def collect(
    statistics: Statistics,
    directory: Path,
    manifest: Manifest,
    images: Images,
    inputs: LayerInputs,
    pipeline: Pipeline,
    path: Path,
    console: Console,
) -> None:
    """Fill the statistics of a bundle's layers, and save them in the file `path` as they grow.

    pipeline: the bundle's networks, whose weights are not looked at. With a smoothing exponent the images are run
    twice. Raises QuantizationError for too many unreadable images, and for NaN, naming the layer.
    """
    passes = _Passes(statistics, manifest, images, inputs, path, console)
    inputs.attention, inputs.convolutions = statistics.attention, statistics.convolutions
    if statistics.smooth:
        passes.run(statistics.measured, [statistics.measure], "measuring channels")
        if not statistics.factors:
            groups = _sharing(pipeline, set(statistics.channels))
            columns = _column_amax(directory, groups)
            statistics.factors = smoothing_factors(statistics.channels, columns, groups, statistics.smooth)
        passes.run(statistics.counted, [statistics.count], "counting magnitudes")
    else:
        passes.run(statistics.counted, [statistics.measure, statistics.count], "counting magnitudes")
    if images.unreadable:
        console.print(f"[yellow]{len(images.unreadable)} images could not be read and were left out[/]")


@dataclass(frozen=True)
class _Passes:
    """Runs all images, once or twice, and saves what is known so far."""

    statistics: Statistics
    manifest: Manifest
    images: Images
    inputs: LayerInputs
    path: Path
    console: Console

    def run(self, done: list[str], observers: Sequence[Observe], description: str) -> None:
        """Show what enters each layer to the observers. done: digests of images that were run, which grows."""
        for index, image in enumerate(track(list(self.images), description=description, console=self.console)):
            digest = self.images.digests[image]
            if digest in done:
                continue
            try:
                bucket, rgb = rgb_of(image, self.manifest)
            except ImageError as error:
                self.images.skip(image, error)
                continue

            def see(layer: str, rows: Float32) -> None:
                for observe in observers:
                    observe(layer, rows)

            try:
                self.inputs(bucket, rgb, see)
            except QuantizationError as error:
                raise QuantizationError(f"{error}, for {image}") from None
            done.append(digest)
            if index % SAVE_EVERY == SAVE_EVERY - 1:
                self.statistics.save(self.path)
        self.statistics.save(self.path)


def check_identity(recorded: Identity, expected: Identity, path: Path) -> None:
    """Raises QuantizationError when statistics are of another network, naming what differs."""
    for role in sorted({*recorded.sources, *expected.sources}):
        if recorded.sources.get(role) != expected.sources.get(role):
            raise QuantizationError(
                f"{path} was made from another model: the digest of its {role} file is "
                f"{recorded.sources.get(role, 'none')[:12]}, that of this bundle's is "
                f"{expected.sources.get(role, 'none')[:12]}. Calibrate anew, with another --output."
            )
    if recorded.rewrites != expected.rewrites:
        raise QuantizationError(
            f"{path} is of a model rewritten by {', '.join(recorded.rewrites)}; "
            f"here it is {', '.join(expected.rewrites)}"
        )


def _sharing(pipeline: Pipeline, observed: set[str]) -> list[tuple[str, ...]]:
    """Groups of linears behind one folded norm, and of convolutions with one input, by full name."""
    groups = []
    convolutions = pipeline.layers(nn.Conv2d)
    for name in pipeline.layers(AttnBlock):
        groups.append(tuple(f"{name}.{part}" for part in ("q", "k", "v")))
    ungrouped = set(convolutions) - {name for group in groups for name in group}
    groups = [group for group in [*groups, *((name,) for name in sorted(ungrouped))] if observed.issuperset(group)]
    for prefix, block in pipeline.denoiser.blocks():
        for _, names in smoothable(block):
            full_names = tuple(f"{prefix}.{name}" for name in names)
            if observed.issuperset(full_names):
                groups.append(full_names)
    return groups


def _column_amax(directory: Path, groups: list[tuple[str, ...]]) -> dict[str, Float32]:
    """Of each weight (N, K, ...) in a bundle's files, the largest magnitude in each of its K columns."""
    amax = {}
    names = [name for group in groups for name in group]
    for stage in STAGES:
        with safe_open(directory / f"{stage}.safetensors", framework="pt") as file:
            for name in (name for name in names if stage_of(name) == stage):
                weight = file.get_tensor(f"{name.removeprefix(f'{stage}.')}.weight").float()
                amax[name] = weight.transpose(0, 1).flatten(1).abs().amax(dim=1).numpy()
    return amax
