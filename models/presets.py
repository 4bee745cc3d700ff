"""The models one can build: rows of one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from densegeo.errors import ConfigError
from densegeo.models.config import TransformerConfig, VAEConfig
from densegeo.models.families import FE2E, FIFFDEPTH, Family
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE
from densegeo.size import Size

# The names under which FE2E's authors publish each role's file, in order of preference.
AUTHORS_FILES = {role.name: role.files for role in FE2E.roles}


@dataclass(frozen=True)
class Preset:
    """A model by name. `sizes`: default buckets. `weights`: where its files lie, if with the code;
    where others are published stands in `published.PUBLICATIONS`.
    """

    name: str
    family: Family
    sizes: tuple[Size, ...]
    weights: Path | None = None
    weights_note: str = ""  # what to know of these weights
    bundle_parameters: int = 0  # about, after the rewrites; at full size alone


PRESETS = {
    row.name: row
    for row in (
        Preset("fe2e", FE2E, (Size(1024, 768),), bundle_parameters=8_700_000_000),
        Preset("fiffdepth", FIFFDEPTH, (Size(768, 576),), bundle_parameters=876_000_000),
        Preset(
            "fe2e-tiny",
            FE2E,
            (Size(256, 192),),
            weights=Path(__file__).parent / "weights" / "fe2e-tiny",
            weights_note="A small model trained on synthetic scenes alone: good for trying things out, "
            "no match for the full one.",
        ),
    )
}


def preset(name: str) -> Preset:
    """Look a model up; raises ConfigError that lists the names."""
    if name not in PRESETS:
        raise ConfigError(f"there is no model {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


TINY_TRANSFORMER = TransformerConfig(
    hidden_size=160,
    num_heads=5,
    axes_dim=(4, 14, 14),
    depth=2,
    depth_single_blocks=4,
    context_in_dim=128,
    vec_in_dim=768,
    prompt_dim=64,
    connector_hidden=128,
    connector_heads=1,
    connector_depth=2,
    mlp_hidden=640,
    connector_mlp_hidden=512,
    in_channels=64,
)
TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=16)
TINY_TEXT_TOKENS, TINY_VALID_TOKENS = 64, 8


def random_state(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random float32 weights for a module on the meta device, scaled so that activations keep their size."""
    state: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            state[key] = noise / math.sqrt(tensor[0].numel())
        elif key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight", "norm.scale")):
            state[key] = 1 + 0.1 * noise
        else:
            state[key] = 0.1 * noise
    return state


def write_random_checkpoint(
    directory: Path,
    transformer: TransformerConfig = TINY_TRANSFORMER,
    vae: VAEConfig = TINY_VAE,
    text_tokens: int = TINY_TEXT_TOKENS,
    valid_tokens: int = TINY_VALID_TOKENS,
    seed: int = 0,
) -> None:
    """Write a seeded random checkpoint under the authors' file and key names: transformer, VAE and prompt, no LoRA."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        modules = {"dit": Transformer(transformer), "vae": VAE(vae)}
    for role, module in modules.items():
        save_file(random_state(module, generator), directory / AUTHORS_FILES[role][0])
    embeds = torch.randn(1, text_tokens, transformer.prompt_dim, generator=generator).numpy()
    mask = np.zeros((1, text_tokens), dtype=np.int64)
    mask[:, :valid_tokens] = 1
    embeds[:, valid_tokens:] = 0
    np.savez(directory / AUTHORS_FILES["prompt"][0], embeds=embeds, masks=mask)
