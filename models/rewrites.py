"""Exact rewrites (DESIGN section 4): each gives the same function with less work, and can be switched off alone.

Prompt and timestep are constant. Each rewrite is one small function over a `Pipeline` in float32; `models.fe2e` and
`models.fiffdepth` list theirs in the order in which they are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn

from densegeo.errors import ConfigError
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.prompt import Prompt
from densegeo.models.vae import VAE, Level, PhaseUpsample, Upsample
from densegeo.outputs import Decode

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass
class Pipeline:
    """The networks of one model, how their output is read, and how many latents of an image one decoder run takes."""

    denoiser: AnyDenoiser  # bound to a prompt
    vae: VAE
    prompt: Prompt
    decode: Decode  # how the denoiser's output becomes geometry
    decoder_batch: int = 1  # of one image

    def stages(self) -> dict[str, nn.Module]:
        """The networks by their names in a bundle."""
        return {"encoder": self.vae.encoder, "denoiser": self.denoiser, "decoder": self.vae.decoder}

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """What `models.quantized` works on, by the names that plans have for it: the denoiser's parts by their own, and
        the autoencoder's halves.
        """
        yield from self.denoiser.parts()
        yield "encoder", self.vae.encoder
        yield "decoder", self.vae.decoder

    def layers(self, kind: type[Layer]) -> dict[str, Layer]:
        """All layers of a kind by the names that plans have for them."""
        roots = (("encoder.", self.vae.encoder), ("", self.denoiser), ("decoder.", self.vae.decoder))
        return {
            prefix + name: layer
            for prefix, root in roots
            for name, layer in root.named_modules()
            if isinstance(layer, kind)
        }

    def eval(self) -> Pipeline:
        for module in (self.denoiser, self.vae):
            module.eval().requires_grad_(False)
        return self


def stage_of(layer: str) -> str:
    """The network in which a layer of `Pipeline.layers` is."""
    return next((half for half in ("encoder", "decoder") if layer.startswith(f"{half}.")), "denoiser")


@dataclass(frozen=True)
class Scope:
    """What a rewrite touches: the whole denoiser, one of its blocks, what is in none, or the prompt's tokens there; or
    half of the autoencoder.

    block: the list in `Denoiser.BLOCKS` and the index in it, -1 for the last one; of the part "block" alone.
    """

    part: Literal["denoiser", "block", "outside", "prompt", "encoder", "decoder"] = "denoiser"
    block: tuple[str, int] = ("", 0)

    @property
    def stage(self) -> str:
        """The network of `Pipeline.stages`."""
        return self.part if self.part in ("encoder", "decoder") else "denoiser"

    @property
    def before_blocks(self) -> bool:
        """Whether it looks at no block, and blocks' rewrites look at what it leaves."""
        return self.part in ("outside", "prompt")

    def touches(self, kind: str, index: int, count: int) -> bool:
        """Whether it changes block `index` of the `count` in the list `kind`."""
        if self.part == "block":
            return (kind, index) == (self.block[0], self.block[1] % count)
        return self.part == "denoiser"


def block(kind: str, index: int) -> Scope:
    """One block alone; it may read what is in none."""
    return Scope("block", (kind, index))


@dataclass(frozen=True)
class Rewrite:
    """One row. requires: names of rewrites without which it is off."""

    name: str
    apply: Callable[[Pipeline], None]
    requires: tuple[str, ...] = ()
    summary: str = ""
    scope: Scope = Scope()


def fold_upsampling(pipeline: Pipeline) -> None:
    """Nearest x2 followed by a 3x3 convolution is four 2x2 convolutions on the small image."""
    for level in pipeline.vae.decoder.up:
        assert isinstance(level, Level)
        if level.resample == "up" and isinstance(level.upsample, Upsample):
            level.upsample = PhaseUpsample(level.upsample)


UPSAMPLE = Rewrite(
    "upsample", fold_upsampling, summary="upsampling convolutions work on the small image", scope=Scope("decoder")
)


def select(among: tuple[Rewrite, ...], without: Iterable[str] = ()) -> tuple[Rewrite, ...]:
    """The rewrites to apply when those named in `without` are off; what requires one of them is off too.

    Raises ConfigError for a name that is no rewrite.
    """
    off, names = set(without), [rewrite.name for rewrite in among]
    if unknown := sorted(off - set(names)):
        raise ConfigError(f"no rewrite is called {', '.join(unknown)}; there are {', '.join(names)}")
    return tuple(r for r in among if r.name not in off and not off.intersection(r.requires))


@torch.no_grad()
def apply(pipeline: Pipeline, rewrites: Iterable[Rewrite]) -> Pipeline:
    """Apply rewrites in place, in order, to a float32 pipeline; returns it."""
    for rewrite in rewrites:
        rewrite.apply(pipeline)
    return pipeline.eval()
