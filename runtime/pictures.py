"""`Geometry` -> pictures for people: depth and normals in colour or grey, and side by side with the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densegeo.argument_checks import items_of, number_of, shown
from densegeo.errors import ConfigError
from densegeo.outputs import FRAMES
from densegeo.runtime.colormap import colorize
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.images import load_image
from densegeo.runtime.resample import resize_rgb

_OPENGL = np.float32(127.5) * np.diag(np.array(FRAMES["opengl"], dtype=np.float32))  # its axes' signs, scaled
Span = tuple[float, float]  # in metres where the depth kind is "metric", else in the prediction's own values


def farness(geometry: Geometry) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(H, W) values that grow with distance and look even, and where they are valid: ln(metres) of metric depth.

    Raises MissingOutputError.
    """
    prediction = geometry.require_prediction("picture of the depth")
    if geometry.depth_kind == "disparity_affine":
        return -prediction, geometry.valid
    if geometry.depth_kind in ("log_affine", "affine"):
        return prediction, geometry.valid
    with np.errstate(invalid="ignore"):
        logarithm: NDArray[np.float32] = np.log(geometry.depth)
    return logarithm, np.isfinite(logarithm)


def depth_picture(geometry: Geometry, span: Span | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) sRGB of the depth, near warm, far cool, whatever its kind; metric depth on a log scale.

    span: what the two ends of the colours stand for; the image's own 2nd and 98th percentile when None. Raises
    MissingOutputError, ConfigError.
    """
    values, valid = farness(geometry)
    return colorize(values, valid, None if span is None else _ends(geometry, span))


def grey_picture(geometry: Geometry, bits: int) -> tuple[NDArray[Any], dict[str, str]]:
    """(H, W) uint8 or uint16 of `farness`, near bright, 0 invalid, over the image's whole range; and what it means.

    Value v in 1..max stands for far + (v - 1) / (max - 1) * (near - far). Raises MissingOutputError.
    """
    values, valid = farness(geometry)
    white = 2**bits - 1
    valid_values = values[valid]
    near, far = (float(valid_values.min()), float(valid_values.max())) if valid_values.size else (0.0, 0.0)
    steps = (white - 1) / (near - far) if near != far else 0.0
    with np.errstate(invalid="ignore"):
        scaled = np.round((values - np.float32(far)) * np.float32(steps)) + 1
    picture = np.where(valid, np.clip(scaled, 1, white), 0).astype(np.uint8 if bits == 8 else np.uint16)
    sign = -1 if geometry.depth_kind == "disparity_affine" else 1
    logarithms = {"metric": "ln(depth in metres)", "up_to_scale": "ln(depth), unit unknown"}
    of = logarithms.get(geometry.depth_kind or "", f"prediction, {geometry.depth_kind}")
    meaning = {
        "densegeo.grey": f"near is bright; 0 is invalid, 1 is far, {white} is near, and between them it is linear",
        "densegeo.grey_quantity": of,
        "densegeo.grey_far": repr(sign * far),
        "densegeo.grey_near": repr(sign * near),
    }
    return picture, meaning


def normals_picture(normals: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(H, W, 3) OpenCV normals -> RGB = (n + 1) / 2 of the OpenGL frame; black where there is none."""
    scaled: NDArray[np.float32] = normals * _OPENGL
    scaled += np.float32(128.0)  # rounds where the cast cuts
    if not np.isfinite(scaled.min()):
        np.nan_to_num(scaled, copy=False, nan=0.0)
    np.clip(scaled, 0, 255, out=scaled)
    return scaled.astype(np.uint8)


def photograph(geometry: Geometry, image: object, color: str) -> NDArray[np.uint8]:
    """The image that a result is of, at the result's size: (H, W, 3) RGB uint8. Raises ImageError, ConfigError."""
    frame = load_image(image, color)
    if frame.size != geometry.source_size:
        raise ConfigError(f"The image is {frame.size}, the result is of {geometry.source_size} (width, height).")
    pixels = frame.rgb
    if pixels.dtype != np.uint8:
        pixels = np.round(255 * pixels).astype(np.uint8)
    height, width = geometry.valid.shape
    return resize_rgb(pixels, width, height)


def side_by_side(geometry: Geometry, image: object = None, color: str = "rgb", span: Span | None = None) -> Image.Image:
    """Optional source image, depth, normals, as far as there are, left to right, each at the result's size."""
    tiles: list[NDArray[Any]] = []
    if image is not None:
        tiles.append(photograph(geometry, image, color))
    if geometry.prediction is not None:
        tiles.append(depth_picture(geometry, span))
    if geometry.normals is not None:
        tiles.append(normals_picture(geometry.normals))
    return Image.fromarray(np.concatenate(tiles, axis=1))


def _ends(geometry: Geometry, span: Span) -> Span:
    """What `farness` is at the near and at the far end of a span."""
    numbers = [number_of(end) for end in items_of(span) or ()]
    low, high = numbers if len(numbers) == 2 else (None, None)
    if low is None or high is None or not low < high:
        raise ConfigError(f"span must be two numbers, the smaller one first, not {shown(span)}.")
    if geometry.depth_kind == "disparity_affine":
        return -high, -low
    if geometry.depth_kind in ("log_affine", "affine"):
        return low, high
    if not low > 0:
        raise ConfigError(f"span must be depths above 0, not {span!r}.")
    return float(np.log(low)), float(np.log(high))
