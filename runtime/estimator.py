"""The estimator: image -> `Geometry`.

One call, in order: `load_image`, `fit_to_bucket`, `run_network` (encoder, transformer, `split_velocity`, decoder),
`assemble`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError, BundleError, ConfigError
from densegeo.runtime.backends import Backend, open_backend
from densegeo.runtime.bundle import Bucket, Decode, Manifest, Stage, check_files, read_manifest
from densegeo.runtime.decode import clamped_normals, depth_prediction, network_to_opencv, split_velocity, unit_normals
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.images import MAX_PIXELS, Color, Frame, load_image
from densegeo.runtime.resample import Placement, authors_bucket, choose_bucket, prepare, prepare_authors, restore

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Activations:
    """What the graphs of one bucket returned, float32.

    latent: (1, C, H/8, W/8); velocity: (1, 2L, 4C); decoded: (2, 3, H, W), depth then normals.
    timings: stage -> milliseconds.
    """

    latent: Float
    velocity: Float
    decoded: Float
    timings: dict[str, float]


class Estimator:
    """A loaded bundle. Calls are independent of each other, so threads may share one estimator.

    bundle: directory made by `densegeo build`. backend: "auto" or a name of `backends.BACKENDS`.
    device: "auto", "cpu", "cuda", "cuda:N". fit: "stretch" fills the bucket, "pad" keeps the aspect ratio.
    preprocessing: "densegeo" (nearest aspect ratio, antialiased) or "authors" (their sizes and filters).
    check_digests: also compare every file's SHA-256 (sizes are always compared). max_pixels: larger images
    are refused before decoding.
    Raises BundleError and its kinds for a bad bundle, BackendError, and ConfigError for a bad option.
    """

    manifest: Manifest

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        device: str = "auto",
        *,
        fit: Literal["stretch", "pad"] = "stretch",
        preprocessing: Literal["densegeo", "authors"] = "densegeo",
        check_digests: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if fit not in ("stretch", "pad"):
            raise ConfigError(f'fit must be "stretch" or "pad", not {fit!r}.')
        if preprocessing not in ("densegeo", "authors"):
            raise ConfigError(f'preprocessing must be "densegeo" or "authors", not {preprocessing!r}.')
        if preprocessing == "authors" and fit == "pad":
            raise ConfigError('The authors\' preprocessing stretches: use fit="stretch" with it.')
        directory = Path(bundle)
        self.manifest = read_manifest(directory)
        if not self.manifest.buckets:
            raise BundleError(f"{directory} has no buckets. Rebuild it with at least one `--size WxH`.")
        check_files(directory, self.manifest, digests=check_digests)
        self._fit, self._preprocessing, self._max_pixels = fit, preprocessing, max_pixels
        self._backend = open_backend(backend, directory, self.manifest, device)

    def __call__(self, image: object, color: Color = "rgb") -> Geometry:
        """Depth and normals of one image, at the image's own (upright) resolution.

        image: path, encoded bytes, PIL image, or array (numpy, DLPack, `__array__`) HxWx3, HxW or HxWx4,
        uint8 or float in [0, 1]. color: channel order of arrays. Raises ImageError and BackendError.
        """
        start = time.perf_counter()
        frame = load_image(image, color, self._max_pixels)
        loaded = time.perf_counter()
        bucket, rgb, placement = self._fit_to_bucket(frame)
        prepared = time.perf_counter()
        activations = run_network(self._backend, self.manifest.decode, bucket, rgb)
        decoded = time.perf_counter()
        prediction, normals = assemble(activations.decoded, placement)
        end = time.perf_counter()
        timings = {
            "load": 1e3 * (loaded - start),
            "prepare": 1e3 * (prepared - loaded),
            **activations.timings,
            "finish": 1e3 * (end - decoded),
            "total": 1e3 * (end - start),
        }
        return Geometry(
            prediction=prediction,
            depth_kind=self.manifest.decode.depth_kind,
            normals=normals,
            valid=np.isfinite(prediction),
            source_size=frame.size,
            timings=timings,
            model=self.manifest.model,
        )

    def batch(self, images: Iterable[object], color: Color = "rgb") -> list[Geometry]:
        """One Geometry an image, in order; the graphs take one image at a time, so images may differ in size."""
        return [self(image, color) for image in images]

    def replay(self, rgb: Float) -> dict[str, Float]:
        """Run a bucket's graphs on a ready input: rgb (1, 3, H, W) in [-1, 1] of one bucket's size.

        Returns float32 "encoder" (1, C, H/8, W/8), "transformer" (1, 2L, 4C), "decoder" (2, 3, H, W),
        "prediction" (H, W) and "normals" (H, W, 3; unit, OpenCV frame). Raises BackendError, ConfigError.
        """
        size = rgb.shape[-2:]
        for bucket in self.manifest.buckets:
            if size == (bucket.height, bucket.width):
                break
        else:
            raise ConfigError(f"This bundle has no bucket for an input of shape {rgb.shape}.")
        activations = run_network(self._backend, self.manifest.decode, bucket, rgb)
        whole = Placement((0, 0, bucket.width, bucket.height), (bucket.width, bucket.height))
        prediction, normals = assemble(activations.decoded, whole)
        return {
            "encoder": activations.latent,
            "transformer": activations.velocity,
            "decoder": activations.decoded,
            "prediction": prediction,
            "normals": normals,
        }

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def device(self) -> str:
        """The device in use: "cpu" or "cuda:N"."""
        return self._backend.device

    def close(self) -> None:
        """Release the graphs; later calls raise BackendError."""
        self._backend.close()

    def __enter__(self) -> Estimator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fit_to_bucket(self, frame: Frame) -> tuple[Bucket, Float, Placement]:
        if self._preprocessing == "authors":
            bucket = authors_bucket(self.manifest.buckets, *frame.size)
            return bucket, *prepare_authors(frame, bucket)
        bucket = choose_bucket(self.manifest.buckets, *frame.size)
        return bucket, *prepare(frame, bucket, self._fit)


def run_network(backend: Backend, decode: Decode, bucket: Bucket, rgb: Float) -> Activations:
    """Encoder, transformer and decoder on rgb (1, 3, H, W) in [-1, 1]. Raises BackendError."""
    timings: dict[str, float] = {}

    def run(stage: Stage, array: Float) -> Float:
        start = time.perf_counter()
        output = backend.run(bucket, stage, array)
        timings[stage] = timings.get(stage, 0.0) + 1e3 * (time.perf_counter() - start)
        return output

    latent = run("encoder", rgb)
    velocity = run("transformer", latent)
    tokens = 2 * (bucket.height // 16) * (bucket.width // 16)
    if velocity.ndim != 3 or velocity.shape[1] != tokens:
        raise BackendError(f"The transformer returned {velocity.shape}, not (1, {tokens}, channels). Rebuild it.")
    latents = split_velocity(velocity, bucket.height, bucket.width, decode)
    if bucket.decoder.inputs[0].shape[0] == 1:
        decoded = np.concatenate([run("decoder", latents[:1]), run("decoder", latents[1:])])
    else:
        decoded = run("decoder", latents)
    return Activations(latent, velocity, decoded, timings)


def assemble(decoded: Float, placement: Placement) -> tuple[Float, Float]:
    """decoded (2, 3, H, W) -> prediction (h, w) and unit OpenCV normals (h, w, 3) at the source's size."""
    prediction = restore(depth_prediction(decoded[0]), placement)
    clamped = clamped_normals(decoded[1])
    resized = np.stack([restore(clamped[..., axis], placement) for axis in range(3)], axis=-1)
    return prediction, network_to_opencv(unit_normals(resized))
