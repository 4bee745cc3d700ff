"""Stage 2: the transformer, with FE2E's consistent-velocity objective (arXiv 2509.04338).

The start of the path is fixed at zero, so the velocity is the same all the way: one step from t = 1 gives the latent
itself. The canvas is [zeros | image]; the left half's velocity is minus the depth latent, the right half's plus the
normals' latent.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from densegeo.files import atomic_write
from densegeo.models.families import FE2E
from densegeo.models.fe2e import collapse_guidance, merge_padding
from densegeo.models.layers import Modulation
from densegeo.models.loading import bound
from densegeo.models.presets import TINY_TEXT_TOKENS, TINY_TRANSFORMER, TINY_VALID_TOKENS
from densegeo.models.prompt import Prompt
from densegeo.models.transformer import Transformer, pack
from densegeo.models.vae import VAE
from densegeo.size import Size
from densegeo.training.data import Chunk, pictures, read_chunks
from densegeo.training.loop import Schedule, autocast, chunks, fit

SCHEDULE = Schedule(steps=10500, batch=8, rate=3e-3, warmup=100, averaging=0.998, every=250)
LAYOUT_WEIGHT, NORMALS_WEIGHT = 2.0, 0.5


def prompt(seed: int) -> Prompt:
    """A stand-in for the cached empty-prompt embedding: seeded, with equal padding."""
    embeds = np.random.default_rng(seed).standard_normal((TINY_TEXT_TOKENS, TINY_TRANSFORMER.prompt_dim))
    mask = np.arange(TINY_TEXT_TOKENS) < TINY_VALID_TOKENS
    return Prompt((embeds * mask[:, None]).astype(np.float32), mask)


def make(seed: int, vae: VAE, size: Size) -> Transformer:
    """The untrained transformer, bound, with the exact rewrites that keep it trainable: no guidance, merged padding.

    Blocks start as the identity and the output at zero (adaLN-zero, arXiv 2212.09748).
    """
    torch.manual_seed(seed)
    transformer = Transformer(TINY_TRANSFORMER)
    modulations: list[nn.Linear] = []
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Modulation):
            modulations.append(module.lin)
    for linear in (*modulations, *transformer.final_layer.modules()):
        if isinstance(linear, nn.Linear):
            nn.init.zeros_(linear.weight)
    for linear in modulations:  # gates start slightly open
        linear.bias.data.view(-1, 3, TINY_TRANSFORMER.hidden_size)[:, 2] = 0.1
    constant = prompt(seed)
    pipeline = bound(FE2E, transformer, vae, constant, size)
    collapse_guidance(pipeline)
    merge_padding(pipeline)
    return transformer


def target(depth: Tensor, normals: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> velocity (B, 2L, 4C): minus depth on the left, plus normals on the right."""
    return torch.cat([pack(-depth), pack(normals)], dim=1)


@torch.no_grad()
def encode(vae: VAE, files: list[Path], folder: Path, device: torch.device, mirrored: int = 0) -> Tensor:
    """Latents of all views, and of the mirror images of the first `mirrored` files' views: (3, N, C, h, w) float16.

    A chunk that was encoded by the same weights is read back.
    """
    digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in vae.parameters())).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    encoder = vae.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = []
    work = [(file, False) for file in files] + [(file, True) for file in files[:mirrored]]
    for file, turned in track(work, description="encoding views"):
        cached = folder / f"{file.stem}-{digest}{'-mirrored' if turned else ''}.safetensors"
        if not cached.exists():
            chunk = read_chunks([file])
            latents = []
            for part in chunks(len(chunk.rgb), 2):
                images = pictures(chunk, np.arange(part.start, part.stop))
                images = (mirror(images) if turned else images).flatten(0, 1).to(device)
                with autocast(device):
                    latent = encoder(images.contiguous(memory_format=torch.channels_last))
                latents.append(latent.unflatten(0, (3, -1)).half().cpu())
            with atomic_write(cached) as partial:
                save_file({"latents": torch.cat(latents, dim=1).numpy()}, partial)
        parts.append(torch.from_numpy(load_file(cached)["latents"]))
    return torch.cat(parts, dim=1)


def mirror(images: Tensor) -> Tensor:
    """Pictures (3, n, 3, H, W) of colour, depth, normals -> of the mirrored scene: left normals point right."""
    mirrored = images.flip(-1)
    mirrored[2, :, 0] *= -1
    return mirrored


@torch.no_grad()
def readout(vae: VAE, chunk: Chunk, count: int = 32) -> Tensor:
    """(C,): which combination of a depth latent's channels is the depth of its 8x8 pixels, by least squares.

    What the decoder makes of a latent is nearly linear in this respect: it explains 99 % of the variance.
    """
    depth = pictures(chunk, np.arange(min(count, len(chunk.rgb))))[1]
    latents = vae.encoder(depth).movedim(1, -1).flatten(0, -2)
    blocks = F.avg_pool2d(depth.mean(1, keepdim=True), 8).flatten()
    columns = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    return torch.linalg.lstsq(columns, blocks[:, None]).solution[:-1, 0]


def train(
    vae: VAE,
    latents: Tensor,
    folder: Path,
    *,
    weights: Tensor,
    seed: int,
    device: torch.device,
    compiled: bool,
    schedule: Schedule = SCHEDULE,
    until: int | None = None,
) -> Transformer:
    """Train, or go on training, on latents (3, N, C, h, w) of colour, depth, normals; returns the averaged weights.

    To FE2E's mean squared error comes the absolute error of the depth that `weights` (see `readout`) read from the
    latents, because most of what is left late in training is the layout of the scene.
    """
    transformer = make(seed, vae, Size(8 * latents.shape[4], 8 * latents.shape[3])).to(device)
    forward = torch.compile(transformer) if compiled else transformer
    weights = weights.to(device)

    def loss(indices: NDArray[np.int64], step: int) -> dict[str, Tensor]:
        colour, depth, normals = latents[:, torch.from_numpy(indices)].to(device).float()
        with autocast(device):
            velocity = forward(colour)
        left, right = (velocity - target(depth, normals)).chunk(2, dim=1)
        layout = (left.unflatten(-1, (len(weights), 4)) * weights[:, None]).sum(-2).abs().mean()
        terms = {"depth": left.square().mean(), "normals": right.square().mean(), "layout": layout}
        total = terms["depth"] + NORMALS_WEIGHT * terms["normals"] + LAYOUT_WEIGHT * layout
        return {"loss": total, **terms}

    averaged = fit(
        "transformer", transformer, loss, latents.shape[1], schedule, folder, seed=seed, until=until,
        muon=hidden_matrices(transformer),
    )  # fmt: skip
    transformer.load_state_dict(averaged, strict=True)
    return transformer.eval().requires_grad_(False)


def hidden_matrices(transformer: Transformer) -> list[nn.Parameter]:
    """The blocks' attention and MLP matrices; their modulation sees one constant vector, its gradients have rank 1."""
    blocks = (*transformer.double_blocks, *transformer.single_blocks)
    named = (pair for block in blocks for pair in block.named_parameters())
    return [parameter for name, parameter in named if parameter.ndim > 1 and "mod" not in name]
