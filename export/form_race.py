"""Which form of graphs is the fastest: a piece of the autoencoder, written in each, by turns in the backend itself."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from densegeo.backends import FORMS, BackendRow, Form
from densegeo.errors import BackendError, ExportError, ResourceError
from densegeo.export.checks import FLOAT32_BOUND, LOW_PRECISION_FACTOR
from densegeo.export.display import Bar, Display
from densegeo.export.graph_stats import describe
from densegeo.export.onnx_graph import export_graph, write_weights
from densegeo.models.casting import cast_module
from densegeo.models.config import VAEConfig
from densegeo.models.vae import PhaseUpsample, ResBlock, TransposedUpsample, Upsample
from densegeo.outputs import Decode, Output
from densegeo.precision import PRECISIONS
from densegeo.runtime.backends import open_backend
from densegeo.runtime.bundle import SCHEMA_VERSION, Bucket, Manifest, Verification, write_manifest
from densegeo.runtime.verify import relative_error
from densegeo.size import Size

LARGEST = 256 * 256  # pixels of what enters the piece: more would tell the same and take longer
ROUNDS, SECONDS, MOST_ROUNDS = 5, 4.0, 100  # at least five, and as many as fit into four seconds
WORTH = 0.97  # of its time: what takes more than this is no reason to leave the backend's own form
MOSTLY = 0.8  # of the rounds must be won by what takes the place of the backend's own form

log = logging.getLogger("densegeo")
Run = Callable[[], NDArray[np.float32]]


class Work(msgspec.Struct, frozen=True):
    """What is raced: the last upsampling of a decoder, at half of the picture's size. widths: features before and after
    it; groups: of its norms; size: of what enters, at most `LARGEST` pixels.
    """

    widths: tuple[int, int]
    groups: int
    size: Size

    @classmethod
    def of(cls, config: VAEConfig, picture: Size) -> Work:
        """For a bundle's first size."""
        outer, inner = (config.ch * factor for factor in config.ch_mult[:2])
        shrink = min(0.5, (LARGEST / (picture.width * picture.height)) ** 0.5)
        return cls((inner, outer), config.groups, Size(*(max(1, int(shrink * side)) for side in picture)))

    @property
    def inputs(self) -> tuple[int, int, int, int]:
        """(1, C, h, w)."""
        return 1, self.widths[0], self.size.height, self.size.width


class Piece(nn.Module):
    """Upsampling with a block before and after it: (1, C, h, w) -> (1, C', 2h, 2w), float32."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        inner, outer = work.widths
        self.before = ResBlock(inner, inner, work.groups)
        self.upsample: nn.Module = Upsample(inner)
        self.after = ResBlock(inner, outer, work.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.upsample(self.before(x.to(self.before.conv1.weight.dtype)))).float()

    def write(self, form: Form, example: Tensor, folder: Path, base: str) -> Path:
        """The graph in a form; changes the module."""
        phases = PhaseUpsample(self.upsample)  # type: ignore[arg-type]
        self.upsample = phases
        cast_module(self, base)
        if form.upsampling == "transposed":
            self.upsample = TransposedUpsample(phases)
        weights, path = folder / "decoder.safetensors", folder / "decoder.onnx"
        write_weights(self, weights)
        export_graph(self, example, ("x", "y"), weights, path, exact=PRECISIONS[base].exact, norms=form.norms)
        return path


@torch.no_grad()
def race(row: BackendRow, base: str, work: Work, display: Display) -> tuple[Form, dict[str, float]]:
    """The fastest form, and the median milliseconds of each by its words; what is wrong or does not run has none.

    Another form than the backend's own must be faster in most rounds, and by more than noise. Raises ExportError where
    not even the backend's own form is right, and ResourceError where the folder for temporary files is full.
    """
    try:
        with TemporaryDirectory(prefix="densegeo-tune-") as scratch, display.bar("tuning", len(FORMS) + ROUNDS) as bar:
            opened = _opened_forms(row, base, work, Path(scratch), bar)
            bar.describe("tuning")
            seconds = _by_turns(opened, bar)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"--tune cannot write into the folder for temporary files, {gettempdir()}: {error}. Name another one in "
            "TMPDIR, or leave --tune out."
        ) from error
    medians = {form: 1e3 * statistics.median(times) for form, times in seconds.items()}
    chosen = min(seconds, key=lambda form: medians[form])
    if not _worth(seconds[chosen], seconds[row.form]):
        chosen = row.form
    return chosen, {str(form): value for form, value in medians.items()}


def _by_turns(opened: dict[Form, Run], bar: Bar) -> dict[Form, list[float]]:
    """Seconds of each round."""
    seconds: dict[Form, list[float]] = {form: [] for form in opened}
    begun, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or (time.perf_counter() - begun < SECONDS and rounds < MOST_ROUNDS):
        for form, run in opened.items():
            start = time.perf_counter()
            run()
            seconds[form].append(time.perf_counter() - start)
        rounds += 1
        if rounds <= ROUNDS:
            bar.advance()
    return seconds


def _worth(times: Sequence[float], own: Sequence[float]) -> bool:
    """Whether one form's rounds are enough of a reason to leave the backend's own."""
    won = sum(ours < theirs for ours, theirs in zip(times, own, strict=True))
    return won >= MOSTLY * len(own) and statistics.median(times) < WORTH * statistics.median(own)


def _opened_forms(row: BackendRow, base: str, work: Work, scratch: Path, bar: Bar) -> dict[Form, Run]:
    """What runs the piece in each form, once run already; forms that do not run or are wrong are left out, with a line.

    Raises ExportError.
    """
    example = torch.randn(work.inputs, generator=torch.Generator().manual_seed(1))
    reference, plain = _piece(work)(example).numpy(), _piece(work)
    cast_module(plain, base)
    plain_error = relative_error(plain(example).numpy(), reference)
    bound = FLOAT32_BOUND if PRECISIONS[base].exact else LOW_PRECISION_FACTOR * plain_error
    opened: dict[Form, Run] = {}
    for index, form in enumerate(FORMS):
        bar.describe(f"tuning: {form}")
        folder = scratch / str(index)
        folder.mkdir()
        try:
            run = _opened(row, base, work, form, example, folder)
            error = relative_error(run(), reference)
        except BackendError as failure:
            log.warning("tuning: %s: %s", form, failure)
        else:
            if error <= bound:
                opened[form] = run
            else:
                log.warning("tuning: %s is off by %.1e, and the bound is %.1e: not taken", form, error, bound)
        bar.advance()
    if row.form not in opened:
        raise ExportError(f"{row.title} does not run its own form ({row.form}) as it should: leave --tune out")
    return opened


def _piece(work: Work) -> Piece:
    """One with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Piece(work).eval()


def _opened(row: BackendRow, base: str, work: Work, form: Form, example: Tensor, folder: Path) -> Run:
    """The backend on a bundle whose every graph is the piece in a form. Raises BackendError."""
    graph = describe(_piece(work).write(form, example, folder, base))
    bucket = Bucket(width=work.size.width, height=work.size.height, encoder=graph, denoiser=graph, decoder=graph)
    output = Output(kind="depth", clamp="after_mean", space="log_affine")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model="a piece of an autoencoder",
        precision=base,
        base=base,
        quantization=None,
        weights_note="",
        buckets=[bucket],
        decode=Decode(packing="latent", outputs=(output,)),
        networks=None,
        rewrites=[],
        files={},
        sources=[],
        build_key="",
        versions={},
        target_architectures=[],
        kernels=[],
        engines=[],
        verification=Verification("", {}, 0.0, []),
        options={},
    )
    write_manifest(folder, manifest)
    backend = open_backend(row.name, folder, manifest, "cpu")
    return partial(backend.run, bucket, "decoder", example.numpy())
