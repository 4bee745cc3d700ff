"""What calibration saw: of every input the magnitudes, by channel and as a histogram; kept in one file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from densegeo.calibration.histogram import Histogram
from densegeo.errors import QuantizationError
from densegeo.files import atomic_write
from densegeo.runtime.bundle import Manifest

FILE = "statistics.safetensors"
COUNTED = 1 << 18  # numbers of an input at once; of larger ones, pictures above all, some rows are counted
_KEY = "densegeo"
Float32 = NDArray[np.float32]


class Identity(msgspec.Struct, frozen=True):
    """Which network statistics are of. graph: digest of the graph that ran; sources: role -> digest of its file."""

    graph: str
    weights: str
    rewrites: list[str]
    sources: dict[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> Identity:
        """The denoiser of a bundle, at its first bucket."""
        files = manifest.files
        return cls(
            files[manifest.buckets[0].denoiser.file].sha256,
            files["denoiser.safetensors"].sha256,
            manifest.rewrites,
            {source.role: source.sha256 for source in manifest.sources},
        )


class _Header(msgspec.Struct):
    identity: Identity
    smooth: float
    measured: list[str]
    counted: list[str]
    limits: dict[str, tuple[float, float]]  # layer -> the histogram's upper edge and largest magnitude
    attention: bool = False
    convolutions: bool = False


class Statistics:
    """Statistics of every layer's input (see `inputs`), over images that are named once they were seen.

    smooth: SmoothQuant's exponent, 0 for none. attention, convolutions: whether those are among the layers. channels:
    layer -> (K,) largest magnitude by channel; histograms: of the input divided by `factors` (layer -> (K,), those that
    have any). measured, counted: images seen for each.
    """

    def __init__(
        self, identity: Identity, smooth: float = 0.0, *, attention: bool = False, convolutions: bool = False
    ) -> None:
        self.identity, self.smooth = identity, smooth
        self.attention, self.convolutions = attention, convolutions
        self.channels: dict[str, Float32] = {}
        self.factors: dict[str, Float32] = {}
        self.histograms: dict[str, Histogram] = {}
        self.measured: list[str] = []
        self.counted: list[str] = []

    def measure(self, layer: str, rows: Float32) -> None:
        """rows (T, K) of a layer's input: the largest magnitude of each channel."""
        amax = np.abs(rows).max(axis=0, initial=0.0)
        if not np.isfinite(amax).all():
            raise QuantizationError(f"NaN or infinity in the input of {layer}")
        self.channels[layer] = np.maximum(self.channels.get(layer, np.zeros_like(amax)), amax)

    def count(self, layer: str, rows: Float32) -> None:
        """rows (T, K) of a layer's input, into its histogram; divided by its factors first."""
        factors = self.factors.get(layer)
        every = rows.size // COUNTED | 1  # odd: a picture's rows of pixels are mostly even
        try:
            self.histograms.setdefault(layer, Histogram()).add(rows if factors is None else rows / factors, every)
        except QuantizationError as error:
            raise QuantizationError(f"{error} in the input of {layer}") from None

    def save(self, path: Path) -> None:
        """Write the file; it is whole or not there."""
        tensors: dict[str, NDArray[np.generic]] = {}
        for prefix, arrays in (("channels", self.channels), ("factors", self.factors)):
            tensors |= {f"{prefix}.{name}": array for name, array in arrays.items()}
        tensors |= {f"counts.{name}": histogram.counts for name, histogram in self.histograms.items()}
        limits = {name: (histogram.upper_edge, histogram.amax) for name, histogram in self.histograms.items()}
        header = _Header(
            self.identity, self.smooth, self.measured, self.counted, limits, self.attention, self.convolutions
        )
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata={_KEY: msgspec.json.encode(header).decode()})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Raises QuantizationError for what is no such file."""
        try:
            with safe_open(path, framework="numpy") as file:
                header = msgspec.json.decode((file.metadata() or {})[_KEY], type=_Header)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
            raise QuantizationError(f"{path} is no file of `densegeo calibrate`: {error}") from error
        statistics = cls(header.identity, header.smooth, attention=header.attention, convolutions=header.convolutions)
        statistics.measured, statistics.counted = header.measured, header.counted
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            if kind == "counts":
                statistics.histograms[layer] = Histogram(tensor, *header.limits[layer])
            else:
                getattr(statistics, kind)[layer] = tensor
        return statistics


def smoothing_factors(
    channels: dict[str, Float32], columns: dict[str, Float32], groups: Iterable[tuple[str, ...]], exponent: float
) -> dict[str, Float32]:
    """Per linear (K,) factors that even out its input's channels: input^a / weight^(1-a), of mean logarithm 0.

    columns: linear -> (K,) largest magnitude in each of the weight's columns. groups: linears that take one and the
    same input and so share factors (arXiv 2211.10438, equation 4).
    """
    factors: dict[str, Float32] = {}
    for group in groups:
        weight_amax = np.max([columns[name] for name in group], axis=0)
        floor = np.float32(1e-5)
        raw = np.maximum(channels[group[0]], floor) ** exponent / np.maximum(weight_amax, floor) ** (1 - exponent)
        centred = (raw / np.exp(np.log(raw).mean())).astype(np.float32)
        factors |= dict.fromkeys(group, centred)
    return factors
