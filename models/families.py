"""The two kinds of model, as rows of one table: what differs between FE2E and FiffDepth on the way to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from densegeo.errors import CheckpointError, ConfigError
from densegeo.models import fe2e, fiffdepth
from densegeo.models.checkpoint import Stored, as_is
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
from densegeo.models.weight_file import Entry
from densegeo.outputs import Decode, Output

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

    timestep: the one step's, as the sinusoids see it. multiple: what a bucket's sides are multiples of; any_size:
    whether others run too, cut down inside. outputs, packing: what the denoiser's output means, see `outputs.Decode`.
    """

    name: str
    denoiser: type[AnyDenoiser]
    config: type[Any]
    rewrites: tuple[Rewrite, ...]
    roles: tuple[Role, ...]
    weights: tuple[str, str]
    architecture: Callable[[dict[str, Path], Entries, Entries], Architecture]
    timestep: float
    multiple: int
    any_size: bool
    packing: Literal["tokens", "latent"]
    outputs: tuple[Output, ...]

    @property
    def rewrite_names(self) -> tuple[str, ...]:
        return tuple(rewrite.name for rewrite in self.rewrites)

    def decode(self, vae: VAEConfig) -> Decode:
        """How outputs are read with an autoencoder of this configuration, which may undo its own scaling."""
        if self.packing == "latent":
            assert vae.decodes_scaled  # the decoder takes the output as it is
            return Decode(packing=self.packing, outputs=self.outputs)
        return Decode(
            packing=self.packing,
            outputs=self.outputs,
            latent_scale=1.0 if vae.decodes_scaled else vae.scale_factor,
            latent_shift=0.0 if vae.decodes_scaled else vae.shift_factor,
        )


def _shapes(entries: Entries) -> Shapes:
    return {key: entry.shape for key, entry in entries.items()}


def _fe2e(paths: dict[str, Path], dit: Entries, vae: Entries) -> Architecture:
    """From the tensors' shapes; the file "config" holds what they do not tell."""
    stated: dict[str, Any] = read_config_file(paths["config"]) if "config" in paths else {}
    with _of(paths["dit"]):
        transformer = transformer_config(_shapes(dit), stated)
    with _of(paths["vae"]):
        autoencoder = vae_config(_shapes(vae), stated.get("vae"))
    return Architecture(transformer, autoencoder, (as_is, as_is))


@contextmanager
def _of(path: Path) -> Iterator[None]:
    """Errors meanwhile name the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


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
    timestep=1000.0,  # t = 1
    multiple=16,
    any_size=False,
    packing="tokens",
    outputs=(
        Output(kind="depth", clamp="before_mean", factor=-1, space="log_affine"),
        Output(kind="normals", clamp="before_mean", frame="dsine"),
    ),
)
FIFFDEPTH = Family(
    name="fiffdepth",
    denoiser=UNet,
    config=UNetConfig,
    rewrites=fiffdepth.REWRITES,
    roles=FIFFDEPTH_ROLES,
    weights=("unet", "vae"),
    architecture=_fiffdepth,
    timestep=0.0,
    multiple=8,
    any_size=True,
    packing="latent",
    outputs=(Output(kind="depth", clamp="after_mean", space="affine"),),
)
FAMILIES = {family.name: family for family in (FE2E, FIFFDEPTH)}
