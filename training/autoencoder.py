"""Stage 1: the autoencoder, on pictures of colour, log depth and normals alike.

Eager: torch.compile (2.13, CPU) gets the bf16 gradients of this network wrong, the encoder's come out as zero.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from densegeo.models.presets import TINY_VAE
from densegeo.models.vae import VAE
from densegeo.training.data import Chunk, pictures
from densegeo.training.loop import Schedule, autocast, fit, generator

SCHEDULE = Schedule(steps=2800, batch=8, rate=1.5e-3, every=100)
CROP = 64  # pixels a side: many small crops vary more than few large ones
LATE_CROP = 128  # in the last quarter, from fewer views: statistics closer to a whole picture's
WEIGHTS = (0.5, 1.0, 1.0)  # of colour, depth, normals
EDGES = 0.5  # weight of differences between neighbours
PULL = 1e-4  # weight of the latents' mean square, reached after RAMP steps: earlier, the latents would collapse
RAMP = 1000
LOG_VARIANCE = -4.6  # of every latent: a fixed standard deviation of 0.1


@torch.no_grad()
def make(seed: int) -> VAE:
    """The untrained autoencoder; its Gaussians' widths are fixed, since learned ones collapse onto the prior."""
    torch.manual_seed(seed)
    vae = VAE(TINY_VAE)
    moments, z = vae.encoder.conv_out, TINY_VAE.z_channels
    assert moments.bias is not None
    torch.nn.init.zeros_(moments.weight[z:])
    torch.nn.init.constant_(moments.bias[z:], LOG_VARIANCE)
    return vae


def reconstruct(vae: VAE, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """images (N, 3, H, W) -> decoded sample (N, 3, H, W), and the latents' mean square."""
    mean, log_variance = vae.encoder.moments(images).float().chunk(2, dim=1)
    return vae.decoder(mean + (0.5 * log_variance.detach()).exp() * noise), mean.square().mean()


def error(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 of values and of differences between neighbours, a mean for each image (N,)."""
    gap = decoded - images
    edges = gap.diff(dim=-1).abs().mean((1, 2, 3)) + gap.diff(dim=-2).abs().mean((1, 2, 3))
    return gap.abs().mean((1, 2, 3)) + EDGES * edges


def train(
    chunk: Chunk,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    schedule: Schedule = SCHEDULE,
    until: int | None = None,
) -> VAE:
    """Train, or go on training; returns the averaged autoencoder, its latents scaled to a standard deviation of 1."""
    sample = torch.cat([pictures(chunk, np.array([index]))[:, 0] for index in range(min(32, len(chunk.rgb)))]).to(
        device
    )
    vae = make(seed).to(device)
    normalise(vae, sample)  # or the first latents drown in the noise, and the decoder learns to ignore them
    height, width = chunk.depth.shape[1:]

    def loss(indices: NDArray[np.int64], step: int) -> dict[str, Tensor]:
        random = generator(seed, step)
        late = step >= 0.75 * schedule.steps
        crop = LATE_CROP if late else CROP
        views = pictures(chunk, indices[: max(1, len(indices) * CROP**2 // crop**2)])
        crops = []
        for index in range(views.shape[1]):
            row, column = (int(torch.randint(0, extent - crop + 1, (), generator=random)) for extent in (height, width))
            part = views[:, index, :, row : row + crop, column : column + crop]
            # Mirrored normals do not fit a mirrored scene, but here only their look matters.
            crops.append(part.flip(-1) if torch.rand((), generator=random) < 0.5 else part)
        images = torch.stack(crops, dim=1).flatten(0, 1)
        noise = torch.randn(len(images), TINY_VAE.z_channels, crop // 8, crop // 8, generator=random)
        with autocast(device):
            decoded, square = reconstruct(vae, images.to(device), noise.to(device))
        colour, depth, normals = error(decoded.float(), images.to(device)).view(3, -1).mean(1)
        total = WEIGHTS[0] * colour + WEIGHTS[1] * depth + WEIGHTS[2] * normals + PULL * min(1.0, step / RAMP) * square
        return {"loss": total, "colour": colour, "depth": depth, "normals": normals, "square": square}

    averaged = fit("autoencoder", vae, loss, len(chunk.rgb), schedule, folder, seed=seed, until=until)
    vae.load_state_dict(averaged)
    vae.eval().requires_grad_(False)
    normalise(vae, sample)
    return vae


@torch.no_grad()
def normalise(vae: VAE, images: Tensor) -> None:
    """Scale the encoder's means, and the decoder's input back, so that latents of `images` have unit deviation."""
    latents = torch.cat([vae.encoder(part) for part in images.split(8)])
    gain = 1 / float(latents.std())
    z = vae.config.z_channels
    vae.encoder.conv_out.weight[:z] *= gain
    assert vae.encoder.conv_out.bias is not None
    vae.encoder.conv_out.bias[:z] *= gain
    vae.decoder.conv_in.weight /= gain


def validate(vae: VAE, chunk: Chunk, count: int = 32) -> dict[str, float]:
    """Mean absolute errors of the decoded mean: colour and depth in [-1, 1], normals in degrees."""
    totals = np.zeros(3)
    for index in range(count):
        images = pictures(chunk, np.array([index]))[:, 0].to(next(vae.parameters()).device)
        decoded = vae.decoder(vae.encoder(images) / vae.config.scale_factor + vae.config.shift_factor).clamp(-1, 1)
        cosine = F.cosine_similarity(decoded[2], images[2], dim=0).clamp(-1, 1)
        gaps = (decoded[:2] - images[:2]).abs().mean((1, 2, 3)).tolist()
        totals += [*gaps, float(cosine.arccos().rad2deg().mean())]
    return dict(zip(("colour", "depth", "normals_degrees"), (totals / count).tolist(), strict=True))
