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
    """latent -> the denoiser's output, float32: FE2E's velocity (1, 2L, 4C), FiffDepth's latent (1, C, H/8, W/8)."""
    output: Tensor = pipeline.denoiser(latent)
    return output


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """latents (pictures, C, H/8, W/8) -> decoded (pictures, channels, H, W) float32."""
    config = pipeline.vae.config
    unscaled = latents if config.decodes_scaled else latents / config.scale_factor + config.shift_factor
    return torch.cat([pipeline.vae.decoder(part) for part in unscaled.split(pipeline.decoder_batch)])


def normals(decoded: Tensor) -> Tensor:
    """decoded (2, 3, H, W) -> unit normals (3, H, W) in the network's axes (left, up, back)."""
    clamped = decoded[1].clamp(-1, 1)
    return F.normalize(clamped, dim=0, eps=1e-9)


def relative(ours: Tensor, wanted: Tensor) -> float:
    """Relative L2 error of a tensor."""
    return float((ours - wanted).norm() / wanted.norm())
