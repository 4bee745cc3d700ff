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

SCHEDULE = Schedule(steps=2800, batch=8, rate=1.5e-3, every=100)  # on crops
WHOLE = Schedule(steps=700, batch=1, rate=4e-4, warmup=50, every=100)  # on whole pictures, whose statistics differ
CROP = 64  # pixels a side: many small crops vary more than few large ones
LATE_CROP = 128  # in the last quarter, from fewer views
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
    schedules: tuple[Schedule, Schedule] = (SCHEDULE, WHOLE),
    until: int | None = None,
) -> VAE:
    """Train, or go on training; returns the averaged autoencoder, its latents scaled to a standard deviation of 1."""
    sample = torch.cat([pictures(chunk, np.array([index]))[:, 0] for index in range(min(32, len(chunk.rgb)))]).to(
        device
    )
    vae = make(seed).to(device)
    normalise(vae, sample)  # or the first latents drown in the noise, and the decoder learns to ignore them
    on_crops, on_whole = schedules

    def terms(images: Tensor, random: torch.Generator, pull: float) -> dict[str, Tensor]:
        """images (3, n, 3, h, w) -> the losses."""
        images = images.flatten(0, 1)
        shape = len(images), TINY_VAE.z_channels, images.shape[2] // 8, images.shape[3] // 8
        noise = torch.randn(shape, generator=random)
        with autocast(device):
            decoded, square = reconstruct(vae, images.to(device), noise.to(device))
        colour, depth, normals = error(decoded.float(), images.to(device)).view(3, -1).mean(1)
        total = WEIGHTS[0] * colour + WEIGHTS[1] * depth + WEIGHTS[2] * normals + pull * square
        return {"loss": total, "colour": colour, "depth": depth, "normals": normals, "square": square}

    def crops(indices: NDArray[np.int64], step: int) -> dict[str, Tensor]:
        side = LATE_CROP if step >= 0.75 * on_crops.steps else CROP
        views = pictures(chunk, indices[: max(1, len(indices) * CROP**2 // side**2)])
        random = generator(seed, step)
        return terms(cut(views, side, random), random, PULL * min(1.0, step / RAMP))

    def whole(indices: NDArray[np.int64], step: int) -> dict[str, Tensor]:
        return terms(pictures(chunk, indices), generator(seed, on_crops.steps + step), PULL)

    for name, loss, schedule in (("autoencoder", crops, on_crops), ("autoencoder_whole", whole, on_whole)):
        vae.load_state_dict(fit(name, vae, loss, len(chunk.rgb), schedule, folder, seed=seed, until=until))
    vae.eval().requires_grad_(False)
    normalise(vae, sample)
    return vae


def cut(views: Tensor, side: int, random: torch.Generator) -> Tensor:
    """A square of each view (3, n, 3, H, W), half of them mirrored -> (3, n, 3, side, side)."""
    height, width = views.shape[-2:]
    squares = []
    for view in views.unbind(1):
        row, column = (int(torch.randint(0, extent - side + 1, (), generator=random)) for extent in (height, width))
        square = view[..., row : row + side, column : column + side]
        # Mirrored normals do not fit a mirrored scene, but here only their look matters.
        squares.append(square.flip(-1) if torch.rand((), generator=random) < 0.5 else square)
    return torch.stack(squares, dim=1)


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
