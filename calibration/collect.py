"""Statistics over many images: one at a time, saved as it goes, and taken up again where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import nn

from densegeo.calibration.inputs import LayerInputs
from densegeo.calibration.statistics import Identity, Statistics, smoothing_factors
from densegeo.errors import ImageError, QuantizationError
from densegeo.models.quantized import smoothable
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
    """Calibration images by a name that says what is in them. Raises QuantizationError when there are too few."""

    def __init__(self, paths: Sequence[Path]) -> None:
        if len(paths) < MINIMUM:
            raise QuantizationError(
                f"{len(paths)} image{'s are' if len(paths) != 1 else ' is'} too few to calibrate with: give at least "
                f"{MINIMUM} different ones, better 64, of what the model will see"
            )
        self.paths = list(paths)
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


def rgb_of(path: Path, manifest: Manifest) -> tuple[Bucket, Float32]:
    """An image as its bucket's input (1, 3, H, W). Raises ImageError."""
    frame = load_image(path)
    bucket = choose_bucket(manifest.buckets, frame.size)
    return bucket, prepare(frame, bucket.size, place(bucket.size, frame.size, "stretch"))


def collect(
    directory: Path,
    manifest: Manifest,
    images: Images,
    inputs: LayerInputs,
    form: Pipeline,
    path: Path,
    *,
    smooth: float,
    attention: bool,
    convolutions: bool,
    console: Console,
) -> Statistics:
    """Statistics of a bundle's linears, in the file `path`.

    form: the bundle's networks, whose weights are not looked at. smooth: SmoothQuant's exponent, 0 for none; with it
    the images are run twice. attention, convolutions: of its attentions, and of its convolutions in all networks, too.
    Raises QuantizationError for statistics of another bundle or exponent, or without those, in `path`, too many
    unreadable images, and NaN, naming the layer.
    """
    identity = Identity.of(manifest)
    statistics = Statistics(identity, smooth, attention=attention, convolutions=convolutions)
    if path.exists():
        statistics = Statistics.load(path)
        check_identity(statistics.identity, identity, path)
        if statistics.smooth != smooth:
            raise QuantizationError(
                f"{path} was made with --smooth {statistics.smooth:g}. Give another --output for {smooth:g}."
            )
        for wanted, there, flag in (
            (attention, statistics.attention, "--attention"),
            (convolutions, statistics.convolutions, "--convolutions"),
        ):
            if wanted and not there:
                raise QuantizationError(f"{path} was made without {flag}. Give another --output.")
    inputs.attention, inputs.convolutions = statistics.attention, statistics.convolutions

    def run(done: list[str], observers: Sequence[Observe], what: str) -> None:
        for index, image in enumerate(track(list(images), description=what, console=console)):
            name = sha256_file(image)
            if name in done:
                continue
            try:
                bucket, rgb = rgb_of(image, manifest)
            except ImageError as error:
                images.skip(image, error)
                continue

            def see(layer: str, rows: Float32) -> None:
                for observe in observers:
                    observe(layer, rows)

            try:
                inputs(bucket, rgb, see)
            except QuantizationError as error:
                raise QuantizationError(f"{error}, for {image}") from None
            done.append(name)
            if index % SAVE_EVERY == SAVE_EVERY - 1:
                statistics.save(path)
        statistics.save(path)

    if smooth:
        run(statistics.measured, [statistics.measure], "measuring channels")
        if not statistics.factors:
            groups = _sharing(form, set(statistics.channels))
            columns = _column_peaks(directory, groups)
            statistics.factors = smoothing_factors(statistics.channels, columns, groups, smooth)
        run(statistics.counted, [statistics.count], "counting magnitudes")
    else:
        run(statistics.counted, [statistics.measure, statistics.count], "counting magnitudes")
    if images.unreadable:
        console.print(f"[yellow]{len(images.unreadable)} images could not be read and were left out[/]")
    return statistics


def check_identity(found: Identity, wanted: Identity, path: Path) -> None:
    """Raises QuantizationError when statistics are of another network, naming what differs."""
    for role in sorted({*found.sources, *wanted.sources}):
        if found.sources.get(role) != wanted.sources.get(role):
            raise QuantizationError(
                f"{path} was made from another model: the digest of its {role} file is "
                f"{found.sources.get(role, 'none')[:12]}, that of this bundle's is "
                f"{wanted.sources.get(role, 'none')[:12]}. Calibrate anew, with another --output."
            )
    if found.rewrites != wanted.rewrites:
        raise QuantizationError(
            f"{path} is of a model rewritten by {', '.join(found.rewrites)}; here it is {', '.join(wanted.rewrites)}"
        )


def _sharing(form: Pipeline, seen: set[str]) -> list[tuple[str, ...]]:
    """Groups of linears behind one folded norm, and of convolutions with one input, by full name."""
    groups = []
    pictured = form.layers(nn.Conv2d)
    for name in form.layers(AttnBlock):
        groups.append(tuple(f"{name}.{part}" for part in ("q", "k", "v")))
    single = set(pictured) - {name for group in groups for name in group}
    groups = [group for group in [*groups, *((name,) for name in sorted(single))] if seen.issuperset(group)]
    for prefix, block in form.denoiser.blocks():
        for _, names in smoothable(block):
            full = tuple(f"{prefix}.{name}" for name in names)
            if seen.issuperset(full):
                groups.append(full)
    return groups


def _column_peaks(directory: Path, groups: list[tuple[str, ...]]) -> dict[str, Float32]:
    """Of each weight (N, K, ...) in a bundle's files, the largest magnitude in each of its K columns."""
    peaks = {}
    names = [name for group in groups for name in group]
    for stage in STAGES:
        with safe_open(directory / f"{stage}.safetensors", framework="pt") as file:
            for name in (name for name in names if stage_of(name) == stage):
                weight = file.get_tensor(f"{name.removeprefix(f'{stage}.')}.weight").float()
                peaks[name] = weight.transpose(0, 1).flatten(1).abs().amax(dim=1).numpy()
    return peaks
