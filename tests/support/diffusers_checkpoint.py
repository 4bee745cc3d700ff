"""Seeded tiny diffusers checkpoints, and FiffDepth's pipeline made of diffusers' own modules (DESIGN section 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
PROMPT_FEATURES = 24


@dataclass(frozen=True)
class Case:
    """A configuration of U-Net and autoencoder, of an image (width, height), and the prompt's tokens."""

    name: str
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (64, 48)
    tokens: int = 2


CASES = (
    Case("sd2-like", {"attention_head_dim": [1, 2], "use_linear_projection": True}),
    Case("sd1-like", {"attention_head_dim": 4, "use_linear_projection": False}),
    Case("odd-latent", {"attention_head_dim": 2}, size=(88, 56)),
    Case("three-tokens", {"attention_head_dim": 2, "use_linear_projection": True}, tokens=3),
    Case(
        "four-levels",
        {
            "block_out_channels": [16, 16, 32, 32],
            "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "flip_sin_to_cos": False,
        },
        {"layers_per_block": 2, "block_out_channels": [8, 16, 16, 24], "norm_num_groups": 4},
        size=(64, 64),
    ),
    Case("two-token-layers", {"transformer_layers_per_block": 2}, {"scaling_factor": 0.3, "shift_factor": 0.05}),
    Case("no-latent-convolutions", {}, {"use_quant_conv": False, "use_post_quant_conv": False}),
)


def modules(case: Case, seed: int = 0) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Random modules of a case; norms and biases are random too, so that a missing one shows.

    Cases with the same autoencoder have the same weights for it.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [16, 32],
            "down_block_types": [CROSS, PLAIN],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": PROMPT_FEATURES,
            "attention_head_dim": 4,
            **case.unet,
        }
    ).eval()
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        **{
            "block_out_channels": [8, 8, 16, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 0.18215,
            **case.vae,
        }
    ).eval()
    for module in (unet, vae):
        generator = torch.Generator().manual_seed(seed + 1)
        for name, tensor in module.named_parameters():
            if tensor.ndim == 1:
                noise = 0.2 * torch.randn(tensor.shape, generator=generator)
                tensor.data = (1 + noise) if "norm" in name and name.endswith("weight") else noise
    return unet, vae


def prompt(case: Case, seed: int = 7) -> Tensor:
    return torch.randn(1, case.tokens, PROMPT_FEATURES, generator=torch.Generator().manual_seed(seed))


def write(directory: Path, case: Case, seed: int = 0) -> Path:
    """A diffusers directory, with the prompt's embedding beside it."""
    for name, module in zip(("unet", "vae"), modules(case, seed), strict=True):
        module.save_pretrained(directory / name)
    save_file({"empty_prompt": prompt(case)}, directory / "empty_prompt.safetensors")
    return directory


def picture(size: tuple[int, int], seed: int = 3) -> Tensor:
    """rgb (1, 3, H, W) in [-1, 1]."""
    width, height = size
    return 2 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) - 1


@torch.no_grad()
def oracle(case: Case, rgb: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Latent, depth latent and depth (H, W) in [0, 1] of diffusers' modules."""
    unet, vae = modules(case, seed)
    shift = vae.config.shift_factor or 0.0
    latent = (vae.encode(rgb).latent_dist.mean - shift) * vae.config.scaling_factor
    depth_latent = unet(latent, 0, encoder_hidden_states=prompt(case)).sample
    decoded = vae.decode(depth_latent / vae.config.scaling_factor + shift).sample
    depth = decoded.mean(1).clip(-1, 1)[0] / 2 + 0.5
    return {"latent": latent, "depth_latent": depth_latent, "depth": depth}
