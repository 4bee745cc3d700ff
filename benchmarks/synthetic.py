"""Models with seeded random weights: nothing to download, and outputs that are neither tiny nor saturated.

QK norms, biases and modulations are random too, so that a rewrite or a port that drops one of them is found out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from densegeo.models.config import TransformerConfig, UNetConfig, VAEConfig
from densegeo.models.families import FE2E, FIFFDEPTH
from densegeo.models.layers import FinalModulation, Modulation, RMSNorm
from densegeo.models.loading import bound
from densegeo.models.prompt import Prompt
from densegeo.models.rewrites import Pipeline
from densegeo.models.transformer import Transformer
from densegeo.models.unet import UNet
from densegeo.models.vae import VAE
from densegeo.size import Size


def _normal(shape: torch.Size, std: float, generator: torch.Generator, mean: float = 0.0) -> Tensor:
    return mean + std * torch.randn(shape, generator=generator, device=generator.device)


@torch.no_grad()
def fill(model: nn.Module, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter of `model` (made on the meta device) a seeded random value; linears in `dtype`."""
    generator = torch.Generator(device).manual_seed(seed)
    modulations = {
        id(linear)
        for module in model.modules()
        if isinstance(module, Modulation | FinalModulation)
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    }
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.Conv2d) and kind == "weight":
                # Modulations read SiLU(vec), whose entries are small: a larger gain spreads scales and gates.
                gain = 1.5 if id(module) in modulations else 0.8
                value = _normal(parameter.shape, gain / math.sqrt(parameter[0].numel()), generator)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm | RMSNorm) and kind != "bias":
                value = _normal(parameter.shape, 0.2, generator, mean=1.0)
            else:
                value = _normal(parameter.shape, 0.1, generator)
            state[f"{name}.{kind}" if name else kind] = value.to(dtype) if isinstance(module, nn.Linear) else value
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)


def random_prompt(tokens: int, valid: int, features: int, seed: int) -> Prompt:
    """`valid` random rows, then padding rows that all hold one random embedding."""
    rng = np.random.default_rng(seed)
    embeds = rng.standard_normal((tokens, features)).astype(np.float32)
    embeds[valid:] = embeds[-1]
    return Prompt(embeds, np.arange(tokens) < valid)


def random_pipeline(
    transformer: TransformerConfig,
    vae: VAEConfig,
    prompt: Prompt,
    size: Size,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """A pipeline without any rewrite, bound to `prompt` and the size.

    dtype: of the transformer's linears; the rest is float32. At full size these alone take 48 GB in float32.
    """
    with torch.device("meta"):
        denoiser, autoencoder = Transformer(transformer), VAE(vae)
    fill(denoiser, seed, device, dtype)
    fill(autoencoder, seed + 1, device)
    autoencoder.decoder.conv_out.weight.data *= 0.5  # most of the decoded values within [-1, 1]
    return _on(device, bound(FE2E, denoiser, autoencoder, prompt, size))


def random_fiffdepth(unet: UNetConfig, vae: VAEConfig, side: int, device: str = "cpu") -> Pipeline:
    """FiffDepth in float32 without any rewrite, bound to a prompt of two tokens and an image of side x side pixels."""
    with torch.device("meta"):
        network, autoencoder = UNet(unet), VAE(vae)
    fill(network, 1, device)
    fill(autoencoder, 2, device)
    prompt = random_prompt(2, 2, unet.cross_attention_dim, seed=0)
    return _on(device, bound(FIFFDEPTH, network, autoencoder, prompt, Size(side, side)))


def _on(device: str, pipeline: Pipeline) -> Pipeline:
    """With the denoiser's tables there too."""
    pipeline.denoiser.to(device)
    return pipeline


def patches(side: int, seed: int) -> NDArray[np.uint8]:
    """Coloured patches (side, side, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (side // 64, side // 64, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def random_image(width: int, height: int, seed: int) -> Tensor:
    """(1, 3, H, W) in [-1, 1]: smooth blobs, as photographs have, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, max(height // 16, 2), max(width // 16, 2), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (0.5 * smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)
