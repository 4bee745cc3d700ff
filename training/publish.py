"""Trained weights -> the authors' files: their names, their keys, bf16; text tokens scaled to fit fp16."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from densegeo.files import atomic_write
from densegeo.models.presets import AUTHORS_FILES
from densegeo.models.prompt import Prompt
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE

TEXT_LIMIT = 2.0**14  # of text tokens' magnitude: fp16 ends at 65,504


def write(transformer: Transformer, vae: VAE, prompt: Prompt, directory: Path) -> list[Path]:
    """Write transformer, autoencoder and prompt; each file appears whole or not at all. Returns the files."""
    transformer = copy.deepcopy(transformer)
    rescale_text(transformer)
    modules: dict[str, nn.Module] = {"dit": transformer, "vae": vae}
    files = []
    for role, module in modules.items():
        file = directory / AUTHORS_FILES[role][0]
        state = {
            key: value.detach().cpu().to(torch.bfloat16).contiguous() for key, value in module.state_dict().items()
        }
        with atomic_write(file) as partial:
            save_file(state, partial)
        files.append(file)
    file = directory / AUTHORS_FILES["prompt"][0]
    with atomic_write(file) as partial:
        np.savez(partial, embeds=prompt.embeds[None], masks=prompt.mask[None].astype(np.int64))
    return [*files, file]


@torch.no_grad()
def rescale_text(transformer: Transformer) -> float:
    """Scale text tokens, in connector and blocks, by a power of two until they keep to `TEXT_LIMIT`; returns it.

    Nothing holds them back in training: only norms read them, so in connector and double blocks their scale is free. In
    the single blocks, which update text and image by one layer, the update then counts for more (2e-4 of the velocity
    for a factor of 1/64).
    """
    tokens, _ = transformer.connector(transformer.prompt_embeds, transformer.prompt_mask, transformer.timestep)
    text, _ = transformer.conditioning()
    largest = float(torch.maximum(tokens.abs().max(), text.abs().max()))
    factor = 2.0 ** -max(0, math.ceil(math.log2(largest / TEXT_LIMIT)))
    refiner, blocks = "connector.S.individual_token_refiner.blocks", "double_blocks"
    names = ["connector.S.input_embedder"]
    for index in range(transformer.config.connector_depth):
        names += [f"{refiner}.{index}.self_attn_proj", f"{refiner}.{index}.mlp.fc2"]
    for index in range(transformer.config.depth):
        names += [f"{blocks}.{index}.txt_attn.proj", f"{blocks}.{index}.txt_mlp.2"]
    scaled = [parameter for name in names for parameter in transformer.get_submodule(name).parameters()]
    for parameter in (*scaled, transformer.get_parameter("txt_in.bias")):
        parameter.mul_(factor)
    return factor
