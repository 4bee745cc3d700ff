"""One bucket's graphs in a row, and what becomes of their pictures: ready input -> prediction and normals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError
from densegeo.runtime.backends import Backend
from densegeo.runtime.bundle import Bucket, Decode, Stage
from densegeo.runtime.decode import clamped_normals, depth_prediction, latents_of, network_to_opencv, unit_normals
from densegeo.runtime.metrics import Laps
from densegeo.runtime.resample import Placement, restore

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Activations:
    """What the graphs of one bucket returned for its B images, float32.

    latent: (B, C, h, w); output: the denoiser's, see `bundle.Decode`; decoded: (pictures * B, channels, 8h, 8w), all
    depths, then all normals if there are any.
    """

    latent: Float
    output: Float
    decoded: Float


def run_network(backend: Backend, decode: Decode, bucket: Bucket, rgb: Float, laps: Sequence[Laps]) -> Activations:
    """Encoder, denoiser and decoder on rgb (B, 3, H, W) in [-1, 1]; notes a lap for each. Raises BackendError."""

    def lap(name: str) -> None:
        for each in laps:
            each.lap(name)

    def run(stage: Stage, array: Float) -> Float:
        output = backend.run(bucket, stage, array)
        lap(stage)
        return output

    latent = run("encoder", rgb)
    output = run("denoiser", latent)
    wanted = tuple(bucket.denoiser.outputs[0].shape)
    if output.shape != wanted:
        raise BackendError(f"The denoiser returned {output.shape}, not {wanted}. Rebuild the bundle.")
    latents = latents_of(output, bucket.height, bucket.width, decode)
    lap("split")
    at_once = bucket.decoder.inputs[0].shape[0]
    parts = [run("decoder", latents[first : first + at_once]) for first in range(0, len(latents), at_once)]
    return Activations(latent, output, parts[0] if len(parts) == 1 else np.concatenate(parts))


def assemble(decoded: Float, placement: Placement, decode: Decode) -> tuple[Float, Float | None]:
    """decoded (pictures, channels, H, W) -> prediction (h, w) and unit OpenCV normals (h, w, 3), if there are any, at
    the source's size.
    """
    prediction = restore(depth_prediction(decoded[0], decode), placement)
    if decode.pictures == 1:
        return prediction, None
    clamped = clamped_normals(decoded[1])
    resized = np.stack([restore(clamped[..., axis], placement) for axis in range(3)], axis=-1)
    return prediction, network_to_opencv(unit_normals(resized))


def assemble_whole(decoded: Float, bucket: Bucket, decode: Decode) -> dict[str, Float]:
    """decoded (pictures * B, channels, 8h, 8w) of a bucket's images as they are -> "prediction" (B, H, W) and, where
    there are any, "normals" (B, H, W, 3), as `assemble` gives them.
    """
    place = Placement((0, 0, bucket.width, bucket.height), (bucket.width, bucket.height))
    pairs = [assemble(decoded[i :: bucket.batch], place, decode) for i in range(bucket.batch)]
    outputs = {"prediction": np.stack([prediction for prediction, _ in pairs])}
    normals = [found for _, found in pairs if found is not None]
    return outputs | {"normals": np.stack(normals)} if normals else outputs
