"""A diffusers directory (`unet/` and `vae/`, each `config.json` and safetensors): architectures and tensor names.

What is read follows diffusers' `UNet2DConditionModel` and `AutoencoderKL`; a setting that changes the function and is
not built here is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from densegeo.errors import ConfigError
from densegeo.models.checkpoint import Stored
from densegeo.models.config import UNetConfig, VAEConfig

# What the networks here assume; a file that leaves one out means the same.
_UNET_FIXED: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_VAE_FIXED: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


def unet_config(values: Mapping[str, Any], path: Path) -> UNetConfig:
    """Raises ConfigError for what is missing, of another type, or not built here."""
    _check_fixed(values, _UNET_FIXED, path)
    channels = _tuple(values, "block_out_channels", None, path)
    levels = len(channels)
    attention = []
    for key, blocks in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        names = tuple(values.get(key, ()))
        if len(names) != levels or any(name not in blocks for name in names):
            raise ConfigError(f"{path}: {key} {list(names)} must be {levels} of {', '.join(blocks)}")
        attention.append(tuple(blocks[name] for name in names))
    config = _convert(
        {
            "in_channels": values.get("in_channels", 4),
            "out_channels": values.get("out_channels", 4),
            "block_out_channels": channels,
            "layers_per_block": values.get("layers_per_block", 2),
            "heads": _tuple(values, "attention_head_dim", 8, path, levels),  # numbers of heads, whatever the name says
            "transformer_layers": _tuple(values, "transformer_layers_per_block", 1, path, levels),
            "down_attention": attention[0],
            "up_attention": attention[1],
            "cross_attention_dim": values.get("cross_attention_dim", 1280),
            "groups": values.get("norm_num_groups", 32),
            "eps": values.get("norm_eps", 1e-5),
            "flip_sin_to_cos": values.get("flip_sin_to_cos", True),
        },
        UNetConfig,
        path,
    )
    if any(width % heads for width, heads in zip(config.block_out_channels, config.heads, strict=True)):
        raise ConfigError(f"{path}: {config.heads} heads do not divide {config.block_out_channels} channels")
    if any(width % config.groups for width in config.block_out_channels) or config.block_out_channels[0] % 2:
        raise ConfigError(f"{path}: {config.block_out_channels} channels must be multiples of {config.groups} and even")
    return config


def sd_vae_config(values: Mapping[str, Any], path: Path) -> VAEConfig:
    """Raises ConfigError for what is missing, of another type, or not built here."""
    _check_fixed(values, _VAE_FIXED, path)
    widths = _tuple(values, "block_out_channels", None, path)
    convs = {values.get(key, True) for key in ("use_quant_conv", "use_post_quant_conv")}
    base, groups = math.gcd(*widths), values.get("norm_num_groups", 32)
    if len(convs) != 1:
        raise ConfigError(f"{path}: use_quant_conv and use_post_quant_conv must be both true or both false")
    if widths[0] != base or any(width % groups for width in widths) or len(widths) != 4:
        raise ConfigError(
            f"{path}: block_out_channels {list(widths)} must be four multiples of the first and of {groups}"
        )
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        expected = [kind] * len(widths)
        if list(values.get(key, expected)) != expected:
            raise ConfigError(f"{path}: {key} {values[key]} must be {len(widths)} times {kind}")
    return _convert(
        {
            "ch": base,
            "ch_mult": tuple(width // base for width in widths),
            "num_res_blocks": values.get("layers_per_block", 1),
            "z_channels": values.get("latent_channels", 4),
            "groups": groups,
            "latent_convs": convs.pop(),
            "decodes_scaled": True,
            "scale_factor": values.get("scaling_factor", 0.18215),
            "shift_factor": values.get("shift_factor") or 0.0,
        },
        VAEConfig,
        path,
    )


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], path: Path) -> None:
    wrong = [
        f"{key} = {values[key]!r} (built: {want!r})" for key, want in fixed.items() if values.get(key, want) != want
    ]
    if wrong:
        raise ConfigError(f"{path} asks for what densegeo does not build: " + "; ".join(wrong))


def _tuple(values: Mapping[str, Any], key: str, default: Any, path: Path, count: int = 0) -> tuple[int, ...]:
    """A list of integers; one number stands for `count` equal ones."""
    value = values.get(key, default)
    if isinstance(value, int) and count:
        value = [value] * count
    if not isinstance(value, list | tuple) or not value or (count and len(value) != count):
        raise ConfigError(f"{path}: {key} = {value!r} must be a list of {count or 'some'} integers")
    return tuple(value)


def _convert(fields: dict[str, Any], kind: type[Any], path: Path) -> Any:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} does not describe a {kind.__name__.removesuffix('Config')}: {error}") from error


# Our autoencoder's names -> diffusers'; `{last}` is the index of the smallest resolution.
_VAE_NAMES = (
    (r"(en|de)coder\.mid\.block_(\d)\.", lambda m, last: f"{m[1]}coder.mid_block.resnets.{int(m[2]) - 1}."),
    (r"(en|de)coder\.mid\.attn_1\.norm\.", lambda m, last: f"{m[1]}coder.mid_block.attentions.0.group_norm."),
    (r"(en|de)coder\.mid\.attn_1\.([qkv])\.", lambda m, last: f"{m[1]}coder.mid_block.attentions.0.to_{m[2]}."),
    (r"(en|de)coder\.mid\.attn_1\.proj_out\.", lambda m, last: f"{m[1]}coder.mid_block.attentions.0.to_out.0."),
    (r"encoder\.down\.(\d+)\.block\.", lambda m, last: f"encoder.down_blocks.{m[1]}.resnets."),
    (r"encoder\.down\.(\d+)\.downsample\.", lambda m, last: f"encoder.down_blocks.{m[1]}.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", lambda m, last: f"decoder.up_blocks.{last - int(m[1])}.resnets."),
    (r"decoder\.up\.(\d+)\.upsample\.", lambda m, last: f"decoder.up_blocks.{last - int(m[1])}.upsamplers.0."),
    (r"(en|de)coder\.norm_out\.", lambda m, last: f"{m[1]}coder.conv_norm_out."),
    (r"encoder\.quant_conv\.", lambda m, last: "quant_conv."),
    (r"decoder\.post_quant_conv\.", lambda m, last: "post_quant_conv."),
)
# Names that files of before 2023 have for attention layers.
_LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def vae_names(config: VAEConfig, entries: Mapping[str, Any]) -> Stored:
    """How a diffusers file stores our autoencoder's tensors. entries: the file's; they tell old names from new ones."""
    last = len(config.ch_mult) - 1
    legacy = "decoder.mid_block.attentions.0.query.weight" in entries

    def stored(key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        name = key
        for pattern, replace in _VAE_NAMES:
            if match := re.match(pattern, name):
                name = replace(match, last) + name[match.end() :]
                break
        name = name.replace("nin_shortcut", "conv_shortcut")
        if "mid_block.attentions" in name:
            if legacy:
                for new, old in _LEGACY.items():
                    name = name.replace(f".{new}.", f".{old}.")
            return name, shape[:2]  # linears there, 1x1 convolutions here
        return name, shape

    return stored


def unet_names(entries: Mapping[str, Any]) -> Stored:
    """How a diffusers file stores our U-Net's tensors: the token stages' projections may be 1x1 convolutions."""

    def stored(key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if key.endswith(("proj_in.weight", "proj_out.weight")) and key in entries:
            return key, shape + (1,) * (len(entries[key].shape) - len(shape))
        return key, shape

    return stored
