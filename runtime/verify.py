"""Replays a bundle's stored verification inputs on this machine and compares with the stored float32 references."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BundleError
from densegeo.runtime.bundle import Check, Decode
from densegeo.runtime.estimator import Estimator
from densegeo.runtime.tensorfile import Array, read_tensors

PICTURES = 2  # stored for a size that also has batches, which they fill by turns; else one


def outputs_of(decode: Decode) -> tuple[str, ...]:
    """What a verification compares."""
    return ("encoder", "denoiser", "decoder", "prediction", *(("normals",) if decode.pictures == 2 else ()))


def replay(bundle: str | os.PathLike[str], backend: str = "auto", device: str = "auto") -> list[Check]:
    """One check an output and bucket, each against the manifest's `replay_bound`.

    The estimator's own stages run, chained as they are for an image. Digests are not checked here.
    Raises BundleError when the stored inputs are missing or misshapen, BackendError when a graph does not run.
    """
    with Estimator(bundle, backend=backend, device=device, check_digests=False) as estimator:
        verification = estimator.manifest.verification
        path = Path(bundle) / verification.inputs
        tensors = read_tensors(path)
        checks = []
        for bucket in estimator.manifest.buckets:
            names = ("rgb", *outputs_of(estimator.manifest.decode))
            stored = [
                {name: _tensor(tensors, path, f"{bucket.size}.{picture}.{name}") for name in names}
                for picture in range(min(bucket.batch, PICTURES))
            ]
            for picture, outputs in enumerate(stored):
                if outputs["rgb"].shape != (1, 3, bucket.height, bucket.width):
                    shape = outputs["rgb"].shape
                    raise BundleError(f"{path}: {bucket.size}.{picture}.rgb has shape {shape}. Rebuild the bundle.")
            wanted = alternating(stored, bucket.batch)
            outputs = estimator.replay(wanted.pop("rgb"))
            for output, reference in wanted.items():
                checks.append(
                    Check(
                        bucket=bucket.name,
                        output=output,
                        reference="stored float32 outputs",
                        error=relative_error(outputs[output], reference),
                        bound=verification.replay_bound,
                    )
                )
        return checks


def alternating(pictures: Sequence[Mapping[str, Array]], batch: int) -> dict[str, NDArray[np.float32]]:
    """Inputs and outputs of single pictures -> those of a batch in which the pictures alternate, float32.

    Decoded pictures come as the decoder gives them: all depths first, then all normals.
    """
    images = [pictures[i % len(pictures)] for i in range(batch)]
    joined = {}
    for name in images[0]:
        parts = [image[name].astype(np.float32, copy=False) for image in images]
        if name == "decoder":
            parts = [part[i : i + 1] for i in range(len(parts[0])) for part in parts]
        joined[name] = np.concatenate(parts)
    return joined


def within(check: Check) -> bool:
    """Whether a check holds; an error that is not a number does not."""
    return check.error <= check.bound


def relative_error(actual: NDArray[np.float32], reference: Array) -> float:
    """Relative L2 norm of the difference, in float64; infinite for another shape or any non-finite value."""
    if actual.shape != reference.shape or not (np.isfinite(actual).all() and np.isfinite(reference).all()):
        return float("inf")
    expected = reference.astype(np.float64).ravel()
    difference = float(np.linalg.norm(actual.astype(np.float64).ravel() - expected))
    scale = float(np.linalg.norm(expected))
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def _tensor(tensors: dict[str, Array], path: Path, name: str) -> Array:
    try:
        return tensors[name]
    except KeyError:
        raise BundleError(f"{path} lacks the verification tensor {name}. Rebuild the bundle.") from None
