"""What the authors' code does, built from diffusers modules: the oracle of the tests and the baseline of speed.

The released pipeline runs a batch of two identical prompts, the connector at every call, the transformer on all text
tokens, and two separate decodes. Its transformer is a Flux one, so diffusers' `FluxTransformer2DModel` and
`AutoencoderKL` compute the same function from re-keyed weights; nothing here uses densegeo's layers, except for the
connector, which diffusers lacks (tests compare that with a second implementation).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from densegeo.models.config import TransformerConfig, VAEConfig
from densegeo.models.connector import Connector
from densegeo.models.rewrites import Pipeline
from densegeo.models.transformer import Transformer

GUIDANCE = 6.0  # the authors' default; the two prompts are identical, so its value does not matter

_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
_SINGLE_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
_QKV = {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}


def flux_state(state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """A Step1X-Edit transformer's tensors under FluxTransformer2DModel's names (the connector's left out)."""
    out: dict[str, Tensor] = {}

    def move(source: str, target: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{target}.{kind}"] = state[f"{source}.{kind}"]

    def split(source: str, targets: list[str], sizes: list[int]) -> None:
        for kind in ("weight", "bias"):
            for target, part in zip(targets, state[f"{source}.{kind}"].split_with_sizes(sizes), strict=True):
                out[f"{target}.{kind}"] = part

    for source, target in _EMBEDDERS.items():
        move(source, target)
    for kind in ("weight", "bias"):  # theirs is (shift, scale), diffusers' (scale, shift)
        shift, scale = state[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        out[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
    hidden = config.hidden_size
    for index in range(config.depth):
        old, new = f"double_blocks.{index}.", f"transformer_blocks.{index}."
        for source, target in _DOUBLE.items():
            move(old + source, new + target)
        for source, target in _DOUBLE_NORMS.items():
            out[new + target] = state[old + source]
        for stream, names in _QKV.items():
            split(f"{old}{stream}.qkv", [f"{new}attn.{name}" for name in names], 3 * [hidden])
    for index in range(config.depth_single_blocks):
        old, new = f"single_blocks.{index}.", f"single_transformer_blocks.{index}."
        for source, target in _SINGLE.items():
            move(old + source, new + target)
        for source, target in _SINGLE_NORMS.items():
            out[new + target] = state[old + source]
        targets = [new + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        split(old + "linear1", targets, [*3 * [hidden], config.mlp_hidden])
    return out


def autoencoder_state(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A Flux autoencoder's tensors under AutoencoderKL's names."""
    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        # ours counts from the full resolution, diffusers in the order of running
        (r"decoder\.up\.(\d+)\.block\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets."),
        (r"decoder\.up\.(\d+)\.upsample\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0."),
        (r"mid\.block_([12])\.", lambda m: f"mid_block.resnets.{int(m[1]) - 1}."),
        (r"mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
        (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
        (r"mid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
        (r"nin_shortcut\.", "conv_shortcut."),
        (r"coder\.norm_out\.", "coder.conv_norm_out."),
    ]
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if ".attentions.0.to_" in new and tensor.ndim == 4:  # a 1x1 convolution here, a linear there
            tensor = tensor[:, :, 0, 0]
        out[new] = tensor
    return out


def make_flux(state: dict[str, Tensor], config: TransformerConfig) -> nn.Module:
    """A diffusers Flux transformer with these weights, which it copies."""
    if config.theta != 10000 or config.mlp_hidden != 4 * config.hidden_size:
        raise ValueError("diffusers' Flux transformer has a fixed theta of 10000 and an MLP ratio of 4")
    flux: nn.Module = cast(Any, FluxTransformer2DModel)(  # diffusers is untyped
        in_channels=config.in_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=config.head_size,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        pooled_projection_dim=config.vec_in_dim,
        axes_dims_rope=config.axes_dim,
    )
    flux.load_state_dict(flux_state(state, config), strict=True)
    return flux.eval().requires_grad_(False)


def make_autoencoder(state: dict[str, Tensor], config: VAEConfig) -> nn.Module:
    """A diffusers Flux autoencoder with these weights, which it copies."""
    levels = len(config.ch_mult)
    autoencoder: nn.Module = cast(Any, AutoencoderKL)(
        block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
    )
    autoencoder.load_state_dict(autoencoder_state(state, levels), strict=True)
    return autoencoder.eval().requires_grad_(False)


class _Constant(nn.Module):
    """Stands for a connector that ran beforehand."""

    def __init__(self, text: Tensor, pooled: Tensor) -> None:
        super().__init__()
        self.text, self.pooled = text, pooled

    def forward(self, embeds: Tensor, mask: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.text.expand(embeds.shape[0], -1, -1), self.pooled.expand(embeds.shape[0], -1)


@dataclass
class Baseline:
    """The authors' pipeline, eager; call the three stages in order."""

    flux: Any  # FluxTransformer2DModel, or a compiled one
    autoencoder: Any  # AutoencoderKL: diffusers is untyped
    connector: nn.Module
    embeds: Tensor  # (1, T, prompt), the transformer's dtype
    mask: Tensor  # (1, T) float32
    timestep: Tensor  # (1, 256) sinusoid of 1000, for the connector
    batch: int = 2

    @property
    def dtype(self) -> torch.dtype:
        return self.embeds.dtype

    @torch.no_grad()
    def connected(self) -> Baseline:
        """The same, but the connector, whose outputs no image changes, has run beforehand."""
        return replace(self, connector=_Constant(*self.connector(self.embeds, self.mask, self.timestep)))

    @torch.no_grad()
    def encode(self, rgb: Tensor) -> Tensor:
        """rgb (1, 3, H, W) in [-1, 1] -> latent (1, C, H/8, W/8) float32."""
        vae = self.autoencoder
        mean: Tensor = vae.encode(rgb.to(vae.dtype)).latent_dist.mean.float()
        latent: Tensor = vae.config.scaling_factor * (mean - vae.config.shift_factor)
        return latent

    @torch.no_grad()
    def transform(self, latent: Tensor) -> Tensor:
        """latent (1, C, h, w) -> velocity (1, 2L, 4C) float32."""
        _, _, height, width = latent.shape
        # Each 2x2 patch is a column of unfold's, with features ordered (channel, row, column).
        image = nn.functional.unfold(latent, kernel_size=2, stride=2).transpose(1, 2).to(self.dtype)
        canvas = torch.cat([torch.zeros_like(image), image], dim=1).repeat(self.batch, 1, 1)
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        text, pooled = self.connector(
            self.embeds.repeat(self.batch, 1, 1), self.mask.repeat(self.batch, 1), self.timestep
        )
        velocity: Tensor = self.flux(
            hidden_states=canvas,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.ones(self.batch, dtype=self.dtype),
            img_ids=torch.cat([ids, ids]).to(self.dtype),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=self.dtype),
            return_dict=False,
        )[0].float()
        if self.batch == 1:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, velocity: Tensor, height: int, width: int) -> Tensor:
        """velocity (1, 2L, 4C), image size in pixels -> decoded (2, 3, H, W) float32, depth first."""
        vae, length = self.autoencoder, velocity.shape[1] // 2
        images = []
        for tokens in (-velocity[:, :length], velocity[:, length:]):
            size = (height // 8, width // 8)
            latent = nn.functional.fold(tokens.transpose(1, 2), output_size=size, kernel_size=2, stride=2)
            unscaled = latent / vae.config.scaling_factor + vae.config.shift_factor
            images.append(vae.decode(unscaled.to(vae.dtype), return_dict=False)[0].float())
        return torch.cat(images)

    def __call__(self, rgb: Tensor) -> Tensor:
        """rgb (1, 3, H, W) in [-1, 1] -> decoded (2, 3, H, W) float32."""
        return self.decode(self.transform(self.encode(rgb)), *rgb.shape[-2:])


def make_baseline(
    pipeline: Pipeline,
    vae_config: VAEConfig,
    *,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    batch: int = 2,
) -> Baseline:
    """The baseline of a pipeline that has no rewrite applied yet; copies its weights."""
    model = pipeline.denoiser
    assert isinstance(model, Transformer)
    assert isinstance(model.connector, Connector)
    connector = copy.deepcopy(model.connector)
    for module in connector.modules():  # autocast: linears in `dtype`, norms in float32
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return Baseline(
        # nn.Module.to: diffusers' own warns about modules it keeps in float32, of which these two have none
        nn.Module.to(make_flux(dict(model.state_dict()), model.config), dtype),
        nn.Module.to(make_autoencoder(dict(pipeline.vae.state_dict()), vae_config), vae_dtype),
        connector,
        model.prompt_embeds.to(dtype),
        model.prompt_mask.clone(),
        model.timestep.clone(),
        batch,
    )
