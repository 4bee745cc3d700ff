"""The two kinds of model, as rows of one table: what differs between FE2E and FiffDepth on the way to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from densegeo.errors import ConfigError
from densegeo.models import fe2e, fiffdepth
from densegeo.models.checkpoint import Entry, Stored, as_is
from densegeo.models.config import (
    TransformerConfig,
    UNetConfig,
    VAEConfig,
    read_config_file,
    read_json,
    transformer_config,
    vae_config,
)
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.diffusers_format import sd_vae_config, unet_config, unet_names, vae_names
from densegeo.models.rewrites import Rewrite
from densegeo.models.roles import FE2E_ROLES, FIFFDEPTH_ROLES, Role
from densegeo.models.transformer import Transformer
from densegeo.models.unet import UNet

Shapes = dict[str, tuple[int, ...]]
Entries = dict[str, Entry]


@dataclass(frozen=True)
class Architecture:
    """What a model's files say of its networks."""

    denoiser: Any  # TransformerConfig or UNetConfig
    vae: VAEConfig
    stored: tuple[Stored, Stored]  # how the denoiser's and the autoencoder's tensors lie in the files


@dataclass(frozen=True)
class Family:
    """A kind of model. roles: its files; `weights` names those of denoiser and autoencoder.

    multiple: what a bucket's sides are multiples of; any_size: whether others run too, cut down inside. clip: whether
    the decoded depth picture is clipped before ("channels") or after ("mean") its mean over channels. packing: of the
    denoiser's output, see `bundle.Decode`.
    """

    name: str
    denoiser: type[AnyDenoiser]
    config: type[Any]
    rewrites: tuple[Rewrite, ...]
    roles: tuple[Role, ...]
    weights: tuple[str, str]
    architecture: Callable[[dict[str, Path], Entries, Entries], Architecture]
    multiple: int
    any_size: bool
    depth_kind: Literal["log_affine", "affine"]
    packing: Literal["tokens", "latent"]
    clip: Literal["channels", "mean"]

    @property
    def rewrite_names(self) -> tuple[str, ...]:
        return tuple(rewrite.name for rewrite in self.rewrites)


def _shapes(entries: Entries) -> Shapes:
    return {key: entry.shape for key, entry in entries.items()}


def _fe2e(paths: dict[str, Path], dit: Entries, vae: Entries) -> Architecture:
    """From the tensors' shapes; the file "config" holds what they do not tell."""
    given: dict[str, Any] = read_config_file(paths["config"]) if "config" in paths else {}
    configs = transformer_config(_shapes(dit), given), vae_config(_shapes(vae), given.get("vae"))
    return Architecture(*configs, (as_is, as_is))


def _fiffdepth(paths: dict[str, Path], unet: Entries, vae: Entries) -> Architecture:
    """From the `config.json` beside the weights."""
    first = unet_config(read_json(paths["unet_config"]), paths["unet_config"])
    second = sd_vae_config(read_json(paths["vae_config"]), paths["vae_config"])
    if (first.in_channels, first.out_channels) != (second.z_channels, second.z_channels):
        raise ConfigError(
            f"{paths['unet_config']} takes {first.in_channels} channels and gives {first.out_channels}; FiffDepth's "
            f"U-Net takes and gives the autoencoder's {second.z_channels}: is this another depth model's?"
        )
    return Architecture(first, second, (unet_names(unet), vae_names(second, vae)))


FE2E = Family(
    name="fe2e",
    denoiser=Transformer,
    config=TransformerConfig,
    rewrites=fe2e.REWRITES,
    roles=FE2E_ROLES,
    weights=("dit", "vae"),
    architecture=_fe2e,
    multiple=16,
    any_size=False,
    depth_kind="log_affine",
    packing="tokens",
    clip="channels",
)
FIFFDEPTH = Family(
    name="fiffdepth",
    denoiser=UNet,
    config=UNetConfig,
    rewrites=fiffdepth.REWRITES,
    roles=FIFFDEPTH_ROLES,
    weights=("unet", "vae"),
    architecture=_fiffdepth,
    multiple=8,
    any_size=True,
    depth_kind="affine",
    packing="latent",
    clip="mean",
)
FAMILIES = {family.name: family for family in (FE2E, FIFFDEPTH)}
