"""Files -> a float32 pipeline, ready for rewrites."""

from __future__ import annotations

import copy
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
from densegeo.models.checkpoint import Stored, check_keys, load_weights
from densegeo.models.config import VAEConfig
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.families import FAMILIES, Family
from densegeo.models.prompt import Prompt, load_prompt
from densegeo.models.rewrites import Pipeline, Rewrite
from densegeo.models.streaming import BlockFile
from densegeo.models.vae import VAE
from densegeo.models.weight_file import Entry, read_entries
from densegeo.size import Size


@dataclass(frozen=True)
class Files:
    """Local files of one model, by role; "config", FE2E's, holds what the tensors do not tell."""

    family: Family
    paths: Mapping[str, Path]

    @classmethod
    def of(cls, family: str, **paths: Path) -> Files:
        """By the family's name: `Files.of("fe2e", dit=..., vae=..., prompt=...)`."""
        return cls(FAMILIES[family], paths)

    @property
    def denoiser(self) -> Path:
        return self.paths[self.family.weights[0]]

    @property
    def vae(self) -> Path:
        return self.paths[self.family.weights[1]]

    @property
    def prompt(self) -> Path:
        return self.paths["prompt"]

    @property
    def lora(self) -> Path | None:
        """What is merged into the denoiser's weights, if anything."""
        merged = (role.name for role in self.family.roles if role.merged_into == self.family.weights[0])
        return next((self.paths[name] for name in merged if name in self.paths), None)


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint, opened: its prompt, and what headers alone tell: modules on the meta device, which stay there, and
    of each file its entries and how they are stored.
    """

    files: Files
    prompt: Prompt
    denoiser: AnyDenoiser
    vae: VAE
    entries: tuple[dict[str, Entry], dict[str, Entry]]
    stored: tuple[Stored, Stored]


def open_skeleton(files: Files) -> Skeleton:
    """Read architectures from headers and configurations, and the prompt. Raises CheckpointError or ConfigError."""
    entries = read_entries(files.denoiser), read_entries(files.vae)
    architecture = files.family.architecture(dict(files.paths), *entries)
    with torch.device("meta"):
        denoiser, vae = files.family.denoiser(architecture.denoiser), VAE(architecture.vae)
    return Skeleton(files, checked_prompt(files.prompt, denoiser), denoiser, vae, entries, architecture.stored)


def load_pipeline(
    files: Files,
    size: Size,
    *,
    allow_unexpected: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Pipeline:
    """Load a pipeline in float32 for one image size, LoRA merged, no rewrite applied.

    Raises CheckpointError for any difference between files and architecture; see load_weights.
    """
    skeleton = open_skeleton(files)
    for module, path, stored, lora in (
        (skeleton.denoiser, files.denoiser, skeleton.stored[0], files.lora),
        (skeleton.vae, files.vae, skeleton.stored[1], None),
    ):
        load_weights(module, path, lora=lora, allow_unexpected=allow_unexpected, progress=progress, stored=stored)
    return bound(files.family, skeleton.denoiser, skeleton.vae, skeleton.prompt, size)


def bound(family: Family, denoiser: AnyDenoiser, vae: VAE, prompt: Prompt, size: Size) -> Pipeline:
    """Networks of a family as a pipeline for one image size, no rewrite applied."""
    return Pipeline(denoiser.bind(prompt, size, family.timestep), vae, prompt, family.decode(vae.config)).eval()


def open_streamed(skeleton: Skeleton, size: Size, *, allow_unexpected: bool = False) -> tuple[Pipeline, BlockFile]:
    """The same, but the denoiser's blocks stay in their file and are read when they run; see `models.streaming`."""
    files, (stored, stored_vae) = skeleton.files, skeleton.stored
    denoiser, vae = copy.deepcopy(skeleton.denoiser), copy.deepcopy(skeleton.vae)
    check_keys(denoiser, files.denoiser, allow_unexpected=allow_unexpected, stored=stored)
    load_weights(vae, files.vae, allow_unexpected=allow_unexpected, stored=stored_vae)
    source = BlockFile(files.denoiser, files.lora, denoiser, stored)
    source.fill_outside(denoiser)
    source.attach(denoiser)
    return bound(files.family, denoiser, vae, skeleton.prompt, size), source


def rewritten_template(
    family: Family, configs: tuple[Any, VAEConfig], prompt: Prompt, applied: Iterable[Rewrite], size: Size
) -> Pipeline:
    """A rewritten pipeline without values: weights on the meta device, tables that do not come from files in place.

    configs: of denoiser and autoencoder.
    """
    with torch.device("meta"):
        denoiser, vae = family.denoiser(configs[0]), VAE(configs[1])
    pipeline = bound(family, denoiser, vae, prompt, size)
    inputs = {name: getattr(denoiser, name) for name in denoiser.INPUTS}
    for name, tensor in inputs.items():
        setattr(denoiser, name, tensor.to("meta"))
    rewrites.apply(pipeline, applied)
    for name, tensor in inputs.items():
        setattr(denoiser, name, tensor)
    return pipeline


def load_rewritten(
    family: Family,
    configs: tuple[Any, VAEConfig],
    prompt: Prompt,
    applied: Iterable[Rewrite],
    files: Mapping[str, Path],
    size: Size,
    device: str = "cpu",
    quantize: Callable[[nn.Module, str], object] | None = None,
    *,
    streamed: bool = False,
) -> Pipeline:
    """Load a pipeline whose weights were stored after rewriting and casting, as a bundle holds them.

    The rewrites run on tensors without values, which gives the modules their final shapes; then the stored tensors take
    their places. configs: of denoiser and autoencoder. files: "encoder", "denoiser" and "decoder". quantize: gets each
    of `Pipeline.parts` and its name, and replaces what is stored as 8-bit numbers. streamed: leave the denoiser's
    blocks in the file, see `models.streaming`.
    Raises CheckpointError when files and modules differ.
    """
    pipeline = rewritten_template(family, configs, prompt, applied, size)
    denoiser, vae = pipeline.denoiser, pipeline.vae
    if quantize is not None:
        for name, part in pipeline.parts():
            quantize(part, name)
    for stage, module in (("encoder", vae.encoder), ("denoiser", denoiser), ("decoder", vae.decoder)):
        try:
            if streamed and module is denoiser:
                source = BlockFile(files[stage])
                source.fill_outside(denoiser)
                source.attach(denoiser)
                continue
            module.load_state_dict(load_file(files[stage], device=device), assign=True)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{files[stage]} does not hold this {stage}'s weights: {error}") from error
        module.to(device)  # tables that are computed and not stored
    return pipeline.eval()


def checked_prompt(path: Path, denoiser: AnyDenoiser) -> Prompt:
    """Load a prompt and check that its width is the denoiser's; raises CheckpointError."""
    prompt, features = load_prompt(path), denoiser.prompt_features
    if prompt.embeds.shape[1] != features:
        raise CheckpointError(
            f"the prompt {path} has {prompt.embeds.shape[1]} features a token, the network wants {features}"
        )
    return prompt
