"""Files -> a float32 pipeline, ready for rewrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from densegeo.errors import CheckpointError
from densegeo.models import rewrites
from densegeo.models.checkpoint import Entry, check_keys, load_weights, read_entries
from densegeo.models.config import (
    TransformerConfig,
    VAEConfig,
    read_config_file,
    transformer_config,
    vae_config,
)
from densegeo.models.prompt import Prompt, load_prompt
from densegeo.models.rewrites import Pipeline, Rewrite
from densegeo.models.streaming import BlockFile, blocks_of
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE


@dataclass(frozen=True)
class Files:
    """Local files of one model. `config` holds what the tensors do not tell."""

    dit: Path
    vae: Path
    prompt: Path
    lora: Path | None = None
    config: Path | None = None


@dataclass(frozen=True)
class Skeleton:
    """What headers alone tell: architectures, modules on the meta device, and each file's entries."""

    transformer: Transformer
    vae: VAE
    entries: Mapping[str, dict[str, Entry]]  # role -> entries, for dit and vae

    @property
    def configs(self) -> tuple[TransformerConfig, VAEConfig]:
        return self.transformer.config, self.vae.config


def open_skeleton(files: Files) -> Skeleton:
    """Read architectures from the files' headers. Raises CheckpointError or ConfigError."""
    given: dict[str, Any] = read_config_file(files.config) if files.config else {}
    entries = {role: read_entries(path) for role, path in (("dit", files.dit), ("vae", files.vae))}
    shapes = {role: {key: entry.shape for key, entry in found.items()} for role, found in entries.items()}
    with torch.device("meta"):
        transformer = Transformer(transformer_config(shapes["dit"], given))
        vae = VAE(vae_config(shapes["vae"], given.get("vae")))
    return Skeleton(transformer, vae, entries)


def load_pipeline(
    files: Files,
    width: int,
    height: int,
    *,
    allow_unexpected: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Pipeline:
    """Load a pipeline in float32 for one image size, LoRA merged, no rewrite applied.

    Raises CheckpointError for any difference between files and architecture; see load_weights.
    """
    skeleton = open_skeleton(files)
    prompt = checked_prompt(files.prompt, skeleton.transformer.config)
    load_weights(skeleton.transformer, files.dit, lora=files.lora, allow_unexpected=allow_unexpected, progress=progress)
    load_weights(skeleton.vae, files.vae, allow_unexpected=allow_unexpected, progress=progress)
    return Pipeline(skeleton.transformer.bind(prompt, width, height), skeleton.vae, prompt).eval()


def open_streamed(
    files: Files, width: int, height: int, *, allow_unexpected: bool = False
) -> tuple[Pipeline, BlockFile]:
    """The same, but the transformer's blocks stay in their file and are read when they run; see `models.streaming`."""
    skeleton = open_skeleton(files)
    transformer = skeleton.transformer
    prompt = checked_prompt(files.prompt, transformer.config)
    check_keys(transformer, files.dit, allow_unexpected=allow_unexpected)
    load_weights(skeleton.vae, files.vae, allow_unexpected=allow_unexpected)
    source = BlockFile(files.dit, files.lora, transformer)
    source.fill_outside(transformer)
    source.attach(transformer)
    return Pipeline(transformer.bind(prompt, width, height), skeleton.vae, prompt).eval(), source


def rewritten_form(
    configs: tuple[TransformerConfig, VAEConfig], prompt: Prompt, applied: Iterable[Rewrite], size: tuple[int, int]
) -> Pipeline:
    """A rewritten pipeline without values: weights on the meta device, tables that do not come from files in place."""
    with torch.device("meta"):
        transformer, vae = Transformer(configs[0]), VAE(configs[1])
    transformer.bind(prompt, *size)
    inputs = {name: getattr(transformer, name) for name in ("prompt_embeds", "prompt_mask", "timestep")}
    for name, tensor in inputs.items():
        setattr(transformer, name, tensor.to("meta"))
    pipeline = rewrites.apply(Pipeline(transformer, vae, prompt), applied)
    for name, tensor in inputs.items():
        setattr(transformer, name, tensor)
    return pipeline


def load_rewritten(
    configs: tuple[TransformerConfig, VAEConfig],
    prompt: Prompt,
    applied: Iterable[Rewrite],
    files: Mapping[str, Path],
    size: tuple[int, int],
    device: str = "cpu",
    quantize: Callable[[nn.Module, str], object] | None = None,
    *,
    streamed: bool = False,
) -> Pipeline:
    """Load a pipeline whose weights were stored after rewriting and casting, as a bundle holds them.

    The rewrites run on tensors without values, which gives the modules their final form; then the stored tensors take
    their places. files: "encoder", "transformer" and "decoder". size: (width, height).
    quantize: gets each block and its name, at last the whole and "", and replaces what is stored as 8-bit numbers.
    streamed: leave the transformer's blocks in the file, see `models.streaming`.
    Raises CheckpointError when files and modules differ.
    """
    pipeline = rewritten_form(configs, prompt, applied, size)
    transformer, vae = pipeline.transformer, pipeline.vae
    if quantize is not None:
        for name, block in (*blocks_of(transformer), ("", transformer)):
            quantize(block, name)
    for stage, module in (("encoder", vae.encoder), ("transformer", transformer), ("decoder", vae.decoder)):
        try:
            if streamed and module is transformer:
                source = BlockFile(files[stage])
                source.fill_outside(transformer)
                source.attach(transformer)
                continue
            module.load_state_dict(load_file(files[stage], device=device), assign=True)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{files[stage]} does not hold this {stage}'s weights: {error}") from error
        module.to(device)  # tables that are computed and not stored
    return pipeline.eval()


def checked_prompt(path: Path, config: TransformerConfig) -> Prompt:
    """Load a prompt and check that its width is the connector's; raises CheckpointError."""
    prompt = load_prompt(path)
    if prompt.embeds.shape[1] != config.prompt_dim:
        raise CheckpointError(
            f"the prompt {path} has {prompt.embeds.shape[1]} features a token, the connector wants {config.prompt_dim}"
        )
    return prompt
