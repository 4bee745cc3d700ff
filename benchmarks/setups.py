"""Sizes of the benchmarks: full, one for CPUs, and a toy for tests; weights, prompt and image are seeded."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from torch import Tensor

from densegeo.benchmarks.synthetic import random_image, random_pipeline, random_prompt
from densegeo.models.config import TransformerConfig, UNetConfig, VAEConfig
from densegeo.models.rewrites import Pipeline
from densegeo.size import Size


@dataclass(frozen=True)
class Setup:
    """A size of the benchmark."""

    transformer: TransformerConfig
    vae: VAEConfig
    size: Size
    tokens: int
    valid: int
    ceiling_size: int  # of the matrices that find the machine's limit

    def pipeline(self) -> Pipeline:
        """Float32, no rewrite applied."""
        prompt = random_prompt(self.tokens, self.valid, self.transformer.prompt_dim, seed=0)
        return random_pipeline(self.transformer, self.vae, prompt, self.size, seed=1)

    def image(self) -> Tensor:
        """(1, 3, H, W) in [-1, 1]."""
        return random_image(*self.size, seed=2)


MID = Setup(
    TransformerConfig(
        hidden_size=768,
        num_heads=6,
        axes_dim=(16, 56, 56),
        depth=4,
        depth_single_blocks=8,
        context_in_dim=1024,
        vec_in_dim=768,
        prompt_dim=896,
        connector_hidden=1024,
        connector_heads=8,
        connector_depth=2,
        mlp_hidden=3072,
        connector_mlp_hidden=4096,
        in_channels=64,
    ),
    VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16),
    size=Size(512, 384),
    tokens=640,
    valid=64,
    ceiling_size=4096,
)
FULL = Setup(  # of the released checkpoints
    TransformerConfig(
        hidden_size=3072,
        num_heads=24,
        axes_dim=(16, 56, 56),
        depth=19,
        depth_single_blocks=38,
        context_in_dim=4096,
        vec_in_dim=768,
        prompt_dim=3584,
        connector_hidden=4096,
        connector_heads=32,
        connector_depth=2,
        mlp_hidden=12288,
        connector_mlp_hidden=16384,
        in_channels=64,
    ),
    VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16),
    size=Size(1024, 768),
    tokens=640,
    valid=64,
    ceiling_size=8192,
)
SD2_UNET = UNetConfig(  # of Stable Diffusion 2, which FiffDepth is trained from
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    heads=(5, 10, 20, 20),
    transformer_layers=(1, 1, 1, 1),
    down_attention=(True, True, True, False),
    up_attention=(False, True, True, True),
    cross_attention_dim=1024,
)
SD2_VAE = VAEConfig(
    ch=128,
    ch_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    z_channels=4,
    latent_convs=True,
    decodes_scaled=True,
    scale_factor=0.18215,
    shift_factor=0.0,
)
SMALL_UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    heads=(2, 4),
    transformer_layers=(1, 1),
    down_attention=(True, False),
    up_attention=(False, True),
    cross_attention_dim=24,
)
SMALL_VAE = msgspec.structs.replace(SD2_VAE, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
SMOKE = Setup(
    TransformerConfig(
        hidden_size=64,
        num_heads=2,
        axes_dim=(4, 14, 14),
        depth=1,
        depth_single_blocks=2,
        context_in_dim=48,
        vec_in_dim=32,
        prompt_dim=40,
        connector_hidden=48,
        connector_heads=2,
        connector_depth=1,
        mlp_hidden=256,
        connector_mlp_hidden=96,
        in_channels=64,
    ),
    VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=16),
    size=Size(64, 48),
    tokens=24,
    valid=6,
    ceiling_size=256,
)
