"""Maps that stay on the backend's device, in the network's own space or in metres: what `Estimator.tensors` gives."""

from __future__ import annotations

import math
from typing import Any

from densegeo.colors import Color
from densegeo.errors import CalibrationError, MissingOutputError
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.outputs import Maps
from densegeo.runtime.backends import FrameBackend
from densegeo.runtime.bundle import Manifest
from densegeo.runtime.images import device_size
from densegeo.runtime.metric import from_parameters, number
from densegeo.runtime.resample import choose_bucket, place


def maps_on_device(
    backend: FrameBackend, manifest: Manifest, image: Any, color: Color, fit: str, metres: Metres | None
) -> Maps[Any]:
    """Of one image, at its size; see `Estimator.tensors`."""
    size = device_size(image, color)
    bucket = choose_bucket(manifest.buckets, size)
    return backend.keep(bucket, image, place(bucket.size, size, fit), color, metres)


def clipped_line(
    manifest: Manifest, scale: float | None, shift: float | None, near: float | None, far: float | None
) -> Metres | None:
    """How a device computes metres; None where no number is given.

    Raises CalibrationError for an unusable line, MissingOutputError of a model without depth.
    """
    if all(value is None for value in (scale, shift, near, far)):
        return None
    kind = manifest.decode.depth_kind
    if kind is None:
        raise MissingOutputError(f"There is no depth in metres: {manifest.model} predicts normals alone.")
    if scale is None or shift is None:
        raise CalibrationError("Depth in metres needs both scale and shift; near and far only clip it.")
    line = from_parameters(kind, scale, shift)
    lowest = number("near", 0.0 if near is None else near)
    highest = number("far", math.inf if far is None else far)
    if not 0 <= lowest < highest:
        raise CalibrationError(f"near and far must be metres with 0 <= near < far, not {near} and {far}.")
    return Metres(kind, line.scale, line.shift, lowest, highest)
