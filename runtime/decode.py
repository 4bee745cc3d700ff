"""What the network's numbers mean: denoiser's output -> latents -> prediction and normals (plain numpy, float32)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import shown
from densegeo.errors import ConfigError
from densegeo.outputs import FRAMES, NORMAL_FLOOR, Clamp, Decode, Frame, Matrix
from densegeo.size import Size

Float = NDArray[np.float32]


def unpack(tokens: Float, size: Size) -> Float:
    """Tokens (B, L, 4C) -> latents (B, C, H/8, W/8): "b (h w) (c 2 2) -> b c (h 2) (w 2)"."""
    rows, columns = size.height // 16, size.width // 16
    channels = tokens.shape[-1] // 4
    grid = tokens.reshape(-1, rows, columns, channels, 2, 2)
    latents: Float = grid.transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, 2 * rows, 2 * columns)
    return latents


def latents_of(output: Float, size: Size, decode: Decode) -> Float:
    """The denoiser's output for B images of a bucket -> the decoder's input (outputs * B, C, h, w), all latents of the
    first output first.
    """
    if decode.packing == "latent":
        return output
    length = (size.height // 16) * (size.width // 16)
    parts = [
        unpack(np.float32(row.factor) * output[:, index * length : (index + 1) * length], size)
        for index, row in enumerate(decode.outputs)
    ]
    latents: Float = np.concatenate(parts)
    np.divide(latents, np.float32(decode.latent_scale), out=latents)
    np.add(latents, np.float32(decode.latent_shift), out=latents)
    return latents


def depth_prediction(decoded: Float, clamp: Clamp) -> Float:
    """Decoded depth picture (channels, H, W) -> p (H, W) in [0, 1]."""
    mean: Float
    if clamp == "before_mean":
        mean = np.clip(decoded, -1.0, 1.0).mean(axis=0, dtype=np.float32)
    else:
        mean = np.clip(decoded.mean(axis=0, dtype=np.float32), -1.0, 1.0)
    np.multiply(mean, np.float32(0.5), out=mean)
    np.add(mean, np.float32(0.5), out=mean)
    return mean


def clamped_normals(decoded: Float) -> Float:
    """Decoded normal picture (3, H, W) -> (H, W, 3) in [-1, 1], the network's axes, not yet unit."""
    return np.ascontiguousarray(np.clip(decoded, -1.0, 1.0).transpose(1, 2, 0))


def make_unit(planes: Float, unit: Float) -> None:
    """Planes (3, H, W) of vectors of any length -> unit length, into `unit` (H, W, 3); a zero vector stays zero."""
    length = planes[0] * planes[0]
    for plane in planes[1:]:
        length += plane * plane
    np.sqrt(length, out=length)
    np.maximum(length, np.float32(NORMAL_FLOOR), out=length)
    for axis, plane in enumerate(planes):
        np.divide(plane, length, out=unit[..., axis])


def turned(normals: Float, matrix: Matrix) -> Float:
    """matrix @ normal of each of (H, W, 3)."""
    rows = np.array(matrix, dtype=np.float32)
    diagonal = np.diag(rows)
    result: Float = normals * diagonal if np.array_equal(rows, np.diag(diagonal)) else normals @ rows.T
    return result


def axes_of(frame: Frame) -> Matrix:
    """A row of `FRAMES`. Raises ConfigError for a name that is none."""
    if not isinstance(frame, str) or frame not in FRAMES:
        raise ConfigError(f"There is no frame {shown(frame)}; choose {', '.join(FRAMES)}.")
    return FRAMES[frame]
