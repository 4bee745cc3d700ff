"""The whole pipeline in plain PyTorch, stage by stage: what exported graphs are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from densegeo.models.rewrites import Pipeline


@torch.no_grad()
def encode(pipeline: Pipeline, rgb: Tensor) -> Tensor:
    """rgb (1, 3, H, W) in [-1, 1] -> latent (1, C, H/8, W/8) float32."""
    latent: Tensor = pipeline.vae.encoder(rgb)
    return latent


@torch.no_grad()
def transform(pipeline: Pipeline, latent: Tensor) -> Tensor:
    """latent -> velocity (1, 2L, 4C) float32."""
    velocity: Tensor = pipeline.transformer(latent)
    return velocity


def split(velocity: Tensor, height: int, width: int) -> Tensor:
    """velocity (1, 2L, 4C) -> latents (2, C, H/8, W/8), depth (minus the left half) first, not unscaled."""
    halves = torch.cat([-velocity[:, : velocity.shape[1] // 2], velocity[:, velocity.shape[1] // 2 :]])
    rows, columns = height // 16, width // 16
    pixels = halves.reshape(2, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(2, -1, 2 * rows, 2 * columns)


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """latents (2, C, H/8, W/8) -> decoded (2, 3, H, W) float32."""
    config = pipeline.vae.config
    unscaled = latents / config.scale_factor + config.shift_factor
    return torch.cat([pipeline.vae.decoder(part) for part in unscaled.split(pipeline.decoder_batch)])


def prediction(decoded: Tensor) -> Tensor:
    """decoded (2, 3, H, W) -> log-affine depth prediction (H, W) in [0, 1]."""
    return decoded[0].clamp(-1, 1).mean(0) / 2 + 0.5


def normals(decoded: Tensor) -> Tensor:
    """decoded (2, 3, H, W) -> unit normals (3, H, W) in the network's axes (left, up, back)."""
    clamped = decoded[1].clamp(-1, 1)
    return F.normalize(clamped, dim=0, eps=1e-9)


def relative(ours: Tensor, wanted: Tensor) -> float:
    """Relative L2 error of a tensor."""
    return float((ours - wanted).norm() / wanted.norm())
