"""What the network's numbers mean: denoiser's output -> latents -> prediction and normals (plain numpy, float32)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from densegeo.runtime.bundle import Decode

Float = NDArray[np.float32]

NORMAL_FLOOR = 1e-9  # smallest length a normal is divided by, as in the released evaluation


def unpack(tokens: Float, height: int, width: int) -> Float:
    """Tokens (B, L, 4C) -> latents (B, C, H/8, W/8): "b (h w) (c 2 2) -> b c (h 2) (w 2)"; sides in pixels."""
    rows, columns = height // 16, width // 16
    channels = tokens.shape[-1] // 4
    grid = tokens.reshape(-1, rows, columns, channels, 2, 2)
    latents: Float = grid.transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, 2 * rows, 2 * columns)
    return latents


def latents_of(output: Float, height: int, width: int, decode: Decode) -> Float:
    """The denoiser's output for B images of height x width pixels -> the decoder's input (pictures * B, C, h, w)."""
    return split_velocity(output, height, width, decode) if decode.packing == "tokens" else output


def split_velocity(velocity: Float, height: int, width: int, decode: Decode) -> Float:
    """Velocity (B, 2L, 4C) -> the decoder's unscaled input (2B, C, H/8, W/8), all depths first, then all normals."""
    length = (height // 16) * (width // 16)
    depth = np.float32(decode.depth_sign) * velocity[:, :length]
    normals = np.float32(decode.normal_sign) * velocity[:, length:]
    latents: Float = np.concatenate([unpack(depth, height, width), unpack(normals, height, width)])
    np.divide(latents, np.float32(decode.latent_scale), out=latents)
    np.add(latents, np.float32(decode.latent_shift), out=latents)
    return latents


def depth_prediction(decoded: Float, decode: Decode) -> Float:
    """Decoded depth picture (channels, H, W) -> p (H, W) in [0, 1]; clipped before or after the channels' mean."""
    mean: Float
    if decode.clip == "channels":
        mean = np.clip(decoded, -1.0, 1.0).mean(axis=0, dtype=np.float32)
    else:
        mean = np.clip(decoded.mean(axis=0, dtype=np.float32), -1.0, 1.0)
    np.multiply(mean, np.float32(0.5), out=mean)
    np.add(mean, np.float32(0.5), out=mean)
    return mean


def clamped_normals(decoded: Float) -> Float:
    """Decoded normal picture (3, H, W) -> (H, W, 3) in [-1, 1], network axes (left, up, back), not yet unit."""
    return np.ascontiguousarray(np.clip(decoded, -1.0, 1.0).transpose(1, 2, 0))


def unit_normals(normals: Float) -> Float:
    """(H, W, 3) of any length -> unit length, same axes; a zero vector stays zero."""
    length = np.sqrt(np.einsum("...c,...c->...", normals, normals))[..., None]  # much faster than a sum over 3
    unit: Float = normals / np.maximum(length, np.float32(NORMAL_FLOOR))
    return unit


def network_to_opencv(normals: Float) -> Float:
    """(left, up, back) -> OpenCV camera frame (right, down, forward): every axis reversed."""
    return -normals
