"""Replays a bundle's stored verification inputs on this machine and compares with the stored float32 references."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BundleError
from densegeo.runtime.bundle import Check, Decode
from densegeo.runtime.estimator import Estimator
from densegeo.runtime.tensorfile import Array, read_tensors


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
            name = f"{bucket.width}x{bucket.height}"
            rgb = _tensor(tensors, path, f"{name}.rgb").astype(np.float32, copy=False)
            if rgb.shape != (1, 3, bucket.height, bucket.width):
                raise BundleError(f"{path}: {name}.rgb has shape {rgb.shape}. Rebuild the bundle.")
            outputs = estimator.replay(rgb)
            for output in outputs_of(estimator.manifest.decode):
                reference = _tensor(tensors, path, f"{name}.{output}")
                checks.append(
                    Check(
                        bucket=name,
                        output=output,
                        reference="stored float32 outputs",
                        error=relative_error(outputs[output], reference),
                        bound=verification.replay_bound,
                    )
                )
        return checks


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
