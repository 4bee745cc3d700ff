"""Architectures, read from the tensors' shapes; only what shapes cannot tell has defaults or comes from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from densegeo.errors import CheckpointError, ConfigError
from densegeo.models.known_layouts import layout

Shapes = Mapping[str, tuple[int, ...]]


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The FE2E transformer and its connector; sizes in features unless said otherwise."""

    hidden_size: int
    num_heads: int
    axes_dim: tuple[int, int, int]  # RoPE features a head for (sequence, row, column); sums to the head size
    depth: int  # double-stream blocks
    depth_single_blocks: int
    context_in_dim: int
    vec_in_dim: int
    prompt_dim: int
    connector_hidden: int
    connector_heads: int
    connector_depth: int
    mlp_hidden: int
    connector_mlp_hidden: int
    in_channels: int  # features of a token: latent channels x 2 x 2
    theta: float = 10000.0

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class VAEConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An autoencoder; latent = scale_factor * (mean - shift_factor)."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    groups: int = 32  # of every group norm
    latent_convs: bool = False  # 1x1 convolutions around the latent, as Stable Diffusion's have
    decodes_scaled: bool = False  # whether the decoder takes scaled latents, and undoes that itself
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


class UNetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The U-Net of Stable Diffusion 1 and 2. Levels go from the largest resolution to the smallest."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]  # features a level
    layers_per_block: int  # residual blocks of a level on the way down; one more on the way up
    heads: tuple[int, ...]  # attention heads a level
    transformer_layers: tuple[int, ...]  # blocks of a level's token stages
    down_attention: tuple[bool, ...]  # whether a level has token stages
    up_attention: tuple[bool, ...]  # in the order in which they run: smallest resolution first
    cross_attention_dim: int  # the prompt's features
    groups: int = 32
    eps: float = 1e-5  # of the residual blocks' norms
    flip_sin_to_cos: bool = True  # cosines first in the time embedding

    @property
    def time_features(self) -> int:
        return 4 * self.block_out_channels[0]


# Keys a --config file may hold besides the two architectures' fields: descriptions that no code depends on.
_DESCRIPTIVE = {"height", "width", "lora_rank", "lora_alpha", "text_tokens", "valid_text_tokens", "mlp_ratio", "vae"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a `--config` JSON object and refuse unknown keys.

    Raises ConfigError when it is missing, malformed, or names a key that is no architecture field.
    """
    values = read_json(path)
    fields = set(TransformerConfig.__struct_fields__)
    unknown = sorted(set(values) - fields - _DESCRIPTIVE)
    unknown += sorted(f"vae.{key}" for key in set(values.get("vae", {})) - set(VAEConfig.__struct_fields__))
    if unknown:
        raise ConfigError(
            f"{path} has unknown keys: {', '.join(unknown)}. Known: {', '.join(sorted(fields))}, vae.{{...}}."
        )
    return values


def _combine(read: dict[str, Any], stated: Mapping[str, Any], defaults: dict[str, Any], model: str) -> dict[str, Any]:
    """Merge what shapes say with what a file says; a contradiction is an error."""
    for key, value in read.items():
        if key in stated and stated[key] != value:
            raise ConfigError(f"the configuration says {key} = {stated[key]}, but the {model}'s tensors have {value}")
    return read | {key: stated.get(key, value) for key, value in defaults.items()}


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest index that `pattern`'s group matches in the keys; 0 when none does."""
    indices = [int(match.group(1)) for key in shapes if (match := re.match(pattern, key))]
    return max(indices, default=-1) + 1


def _dim(shapes: Shapes, key: str, axis: int, model: str) -> int:
    if key not in shapes or len(shapes[key]) <= axis:
        raise CheckpointError(f"this is no {model}: it lacks {key!r}; {layout(shapes)}")
    return shapes[key][axis]


def transformer_config(shapes: Shapes, stated: Mapping[str, Any] | None = None) -> TransformerConfig:
    """Read the transformer's architecture from its tensors' shapes.

    Defaults for what shapes do not tell: RoPE axes in the ratio 16:56:56 of the head size, theta 10000,
    connector heads of 128 features. `stated` (see read_config_file) supplies or confirms values.
    Raises CheckpointError for another model's tensors, ConfigError for contradictions and impossible sizes.
    """
    stated = stated or {}
    model = "Step1X-Edit transformer"
    hidden = _dim(shapes, "img_in.weight", 0, model)
    head = _dim(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 0, model)
    connector = _dim(shapes, "connector.S.input_embedder.weight", 0, model)
    read = {
        "hidden_size": hidden,
        "num_heads": hidden // head,
        "depth": _count(shapes, r"double_blocks\.(\d+)\."),
        "depth_single_blocks": _count(shapes, r"single_blocks\.(\d+)\."),
        "context_in_dim": _dim(shapes, "txt_in.weight", 1, model),
        "vec_in_dim": _dim(shapes, "vector_in.in_layer.weight", 1, model),
        "prompt_dim": _dim(shapes, "connector.S.input_embedder.weight", 1, model),
        "connector_hidden": connector,
        "connector_depth": _count(shapes, r"connector\.S\.individual_token_refiner\.blocks\.(\d+)\."),
        "mlp_hidden": _dim(shapes, "double_blocks.0.img_mlp.0.weight", 0, model),
        "connector_mlp_hidden": _dim(shapes, "connector.S.individual_token_refiner.blocks.0.mlp.fc1.weight", 0, model),
        "in_channels": _dim(shapes, "img_in.weight", 1, model),
    }
    if hidden % head:
        raise ConfigError(f"hidden size {hidden} is no multiple of the head size {head}")
    if "axes_dim" not in stated and head % 32:  # axes are even numbers
        raise ConfigError(f"a head size of {head} has no default RoPE axes (16:56:56): give axes_dim with --config")
    if "connector_heads" not in stated and connector % 128:
        raise ConfigError(
            f"the connector's {connector} features are no multiple of 128, so its number of heads is unknown: "
            "give connector_heads with --config"
        )
    values = _combine(
        read,
        stated,
        {
            "axes_dim": (head // 8, head * 7 // 16, head * 7 // 16),
            "theta": 10000.0,
            "connector_heads": connector // 128,
        },
        model,
    )
    values["axes_dim"] = tuple(values["axes_dim"])
    if sum(values["axes_dim"]) != head or any(axis % 2 for axis in values["axes_dim"]):
        raise ConfigError(f"axes_dim {values['axes_dim']} must be three even numbers that sum to the head size {head}")
    if connector % values["connector_heads"]:
        raise ConfigError(f"{values['connector_heads']} connector heads do not divide {connector} features")
    return TransformerConfig(**values)


def vae_config(shapes: Shapes, stated: Mapping[str, Any] | None = None) -> VAEConfig:
    """Read the autoencoder's architecture from its tensors' shapes; `stated` is the configuration's `vae` object."""
    model = "Flux autoencoder"
    ch = _dim(shapes, "encoder.conv_in.weight", 0, model)
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    widths = [_dim(shapes, f"encoder.down.{level}.block.0.conv2.weight", 0, model) for level in range(levels)]
    if any(width % ch for width in widths) or ch % 32:
        raise ConfigError(f"the {model}'s widths {widths} must be multiples of its base width {ch}, and that of 32")
    read = {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": _dim(shapes, "decoder.conv_in.weight", 1, model),
    }
    stated = dict(stated or {})
    if "ch_mult" in stated:
        stated["ch_mult"] = tuple(stated["ch_mult"])
    return VAEConfig(**_combine(read, stated, {"scale_factor": 0.3611, "shift_factor": 0.1159}, model))
