"""One bucket's networks in a row on the host, and what becomes of their pictures: ready input -> maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError, ConfigError
from densegeo.outputs import Decode, Maps, Output, into_opencv
from densegeo.runtime.bundle import Bucket, Manifest, Stage
from densegeo.runtime.decode import clamped_normals, depth_prediction, latents_of, make_unit, turned
from densegeo.runtime.resample import Placement, cropped, plain_strips, restore, whole

Float = NDArray[np.float32]


class Runs(Protocol):
    """What runs one network: a backend, or a build's check."""

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> Float: ...


@dataclass(frozen=True, eq=False)
class Activations:
    """What the networks of one bucket made of its B images, float32.

    latent: (B, C, h, w); output: the denoiser's, see `outputs.Decode`; decoded: (outputs * B, channels, 8h, 8w), all of
    the first output first.
    """

    latent: Float
    output: Float
    decoded: Float


@dataclass(frozen=True)
class Chain:
    """Encode, denoise, split, decode in parts. ended: called with each step's name when it has ended."""

    backend: Runs
    decode: Decode
    bucket: Bucket
    ended: Callable[[str], object] = lambda name: None

    def __call__(self, rgb: Float) -> Activations:
        """rgb (B, 3, H, W) in [-1, 1] of the bucket's batch and size. Raises BackendError."""
        latent = self.run("encoder", rgb)
        output = self.run("denoiser", latent)
        return Activations(latent, output, self.pictures(output))

    def run(self, stage: Stage, array: Float) -> Float:
        """One network on all that it takes at once."""
        output = self.backend.run(self.bucket, stage, array)
        self.ended(stage)
        return output

    def pictures(self, output: Float) -> Float:
        """The denoiser's output -> decoded pictures."""
        expected_shape = tuple(self.bucket.denoiser.outputs[0].shape)
        if output.shape != expected_shape:
            raise BackendError(f"The denoiser returned {output.shape}, not {expected_shape}. Rebuild the bundle.")
        latents, at_once = latents_of(output, self.bucket.size, self.decode), self.bucket.decodes_at_once
        self.ended("split")
        parts = [self.run("decoder", latents[first : first + at_once]) for first in range(0, len(latents), at_once)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def assemble(decoded: Float, placement: Placement, decode: Decode) -> Maps[Float]:
    """One image's decoded pictures (outputs, channels, H, W) -> its maps at the source's size."""
    pairs = zip(decode.outputs, decoded, strict=True)
    return Maps(**{row.name: _restored(picture, row, placement) for row, picture in pairs})


def assemble_whole(decoded: Float, bucket: Bucket, decode: Decode) -> dict[str, Float]:
    """decoded (outputs * B, channels, 8h, 8w) of a bucket's images as they are -> by name what `assemble` gives of
    them: "prediction" (B, H, W), "normals" (B, H, W, 3).
    """
    place = whole(bucket.size)
    maps_of_images = [assemble(decoded[i :: bucket.batch], place, decode).named() for i in range(bucket.batch)]
    return {name: np.stack([maps[name] for maps in maps_of_images]) for name in decode.names}


def replay(backend: Runs, manifest: Manifest, rgb: Float) -> dict[str, Float]:
    """What `Estimator.replay` gives. Raises BackendError, and ConfigError where no bucket takes this shape."""
    shape = tuple(getattr(rgb, "shape", ()))
    for bucket in manifest.buckets:
        if shape == (bucket.batch, 3, bucket.height, bucket.width):
            break
    else:
        raise ConfigError(f"This bundle has no bucket for an input of shape {shape}.")
    activations = Chain(backend, manifest.decode, bucket)(rgb)
    outputs = {"encoder": activations.latent, "denoiser": activations.output, "decoder": activations.decoded}
    return outputs | assemble_whole(activations.decoded, bucket, manifest.decode)


def _restored(picture: Float, row: Output, placement: Placement) -> Float:
    """A decoded picture (channels, H, W) -> the prediction (h, w), or unit OpenCV normals (h, w, 3)."""
    if row.frame is None:
        return restore(depth_prediction(picture, row.clamp), placement)
    # turned first: axes change places and signs alone, and the small picture is cheaper
    clamped = turned(clamped_normals(cropped(picture, placement)), into_opencv(row.frame))
    width, height = placement.source
    normals = np.empty((height, width, 3), dtype=np.float32)
    for rows, strip in plain_strips(np.ascontiguousarray(clamped.transpose(2, 0, 1)), width, height):
        make_unit(strip, normals[rows])
    return normals
