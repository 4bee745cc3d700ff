"""Trained weights -> the authors' files: their names, their keys, bf16."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from densegeo.models.presets import AUTHORS_FILES
from densegeo.models.prompt import Prompt
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE


def write(transformer: Transformer, vae: VAE, prompt: Prompt, directory: Path) -> list[Path]:
    """Write transformer, autoencoder and prompt; each file appears whole or not at all. Returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    modules: dict[str, nn.Module] = {"dit": transformer, "vae": vae}
    files = []
    for role, module in modules.items():
        file = directory / AUTHORS_FILES[role][0]
        state = {
            key: value.detach().cpu().to(torch.bfloat16).contiguous() for key, value in module.state_dict().items()
        }
        save_file(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
        files.append(file)
    file = directory / AUTHORS_FILES["prompt"][0]
    with open(file.with_suffix(".tmp"), "wb") as stream:
        np.savez(stream, embeds=prompt.embeds[None], masks=prompt.mask[None].astype(np.int64))
    os.replace(file.with_suffix(".tmp"), file)
    return [*files, file]
