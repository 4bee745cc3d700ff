"""Operations and bytes of the autoencoder's forms, and the time that a GPU's peaks allow each layer: counted, not run.

A layer reads its inputs and weights and writes its output once. A group norm reads twice, as its statistics come first;
SiLU and a residual's sum join the layer before or after them in our kernels and cost no pass of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from densegeo.models.config import VAEConfig
from densegeo.models.vae import VAE, AttnBlock, Norm, Upsample

GPU, FLOPS, BYTES_A_SECOND = "H100 SXM", 989e12, 3.35e12  # NVIDIA's data sheet: dense bf16, HBM3
WIDTH = 2  # bytes of a bf16 number
FORMS = ("plain", "phases", "transposed")


@dataclass(frozen=True)
class Work:
    """Of one launch."""

    flops: int
    elements: int  # read and written

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / FLOPS, WIDTH * self.elements / BYTES_A_SECOND)


def convolution(inputs: int, weights: int, outputs: int, flops: int) -> Work:
    return Work(flops, inputs + weights + outputs)


def upsampling(form: str, channels: int, height: int, width: int, batch: int = 1) -> list[Work]:
    """Of the launches of nearest x2 and a 3x3 convolution on (batch, channels, height, width)."""
    small, large = (batch * channels * count for count in (height * width, 4 * height * width))
    if form == "plain":
        weight = 9 * channels**2
        return [Work(0, small + large), convolution(large, weight, large, 2 * large * 9 * channels)]
    weight = 16 * channels**2
    if form == "transposed":
        return [convolution(small, weight, large, 2 * small * 16 * channels)]
    phases = 4 * batch * channels * (height + 1) * (width + 1)
    return [convolution(small, weight, phases, 2 * phases * 4 * channels), Work(0, phases + large)]


def work_of(network: nn.Module, example: Tensor, form: str) -> Iterator[Work]:
    """Of every launch of `network(example)`, whose upsampling is plain and counted in a form. example: on meta."""
    launches: list[Work] = []

    def note_launch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        if isinstance(module, Upsample):
            batch, channels, height, width = x.shape
            launches.extend(upsampling(form, channels, height, width, batch))
        elif isinstance(module, Norm):
            launches.append(Work(0, 2 * x.numel() + output.numel()))
        elif isinstance(module, AttnBlock):
            batch, channels, height, width = x.shape
            launches.append(Work(4 * batch * (height * width) ** 2 * channels, 4 * x.numel()))
        elif isinstance(module, nn.Conv2d):
            weight = module.weight
            launches.append(
                convolution(x.numel(), weight.numel(), output.numel(), 2 * output.numel() * weight[0].numel())
            )

    inside = {id(module.conv) for module in network.modules() if isinstance(module, Upsample)}
    for module in network.modules():
        if isinstance(module, Upsample | Norm | AttnBlock | nn.Conv2d) and id(module) not in inside:
            module.register_forward_hook(note_launch)
    with torch.no_grad():
        network(example)
    yield from launches


def _row(part: str, form: str, work: list[Work]) -> dict[str, Any]:
    return {
        "part": part,
        "form": form,
        "tflop": sum(launch.flops for launch in work) / 1e12,
        "gb": WIDTH * sum(launch.elements for launch in work) / 1e9,
        "floor_ms": 1e3 * sum(launch.floor for launch in work),
    }


def counted(config: VAEConfig, width: int, height: int) -> dict[str, Any]:
    """The encoder; each upsampling, and the decoder of two latents, in each form."""
    with torch.device("meta"):
        vae = VAE(config)
    picture, z = torch.empty(1, 3, height, width, device="meta"), config.z_channels
    latent = torch.empty(1, z, height // 8, width // 8, device="meta")
    rows = [_row("encoder", "", list(work_of(copy.deepcopy(vae.encoder), picture, "plain")))]
    for index in range(len(config.ch_mult) - 1, 0, -1):
        factor = 2 ** (len(config.ch_mult) - 1 - index)
        channels, sides = config.ch * config.ch_mult[index], (factor * height // 8, factor * width // 8)
        rows += [_row(f"decoder.up.{index}.upsample", form, upsampling(form, channels, *sides)) for form in FORMS]
    for form in FORMS:
        one = list(work_of(copy.deepcopy(vae.decoder), latent, form))
        both = list(work_of(copy.deepcopy(vae.decoder), latent.expand(2, -1, -1, -1), form))
        rows.append(_row("decoder, two latents", f"{form}, one after the other", one + one))
        rows.append(_row("decoder, two latents", f"{form}, one batch", both))
    return {"size": [width, height], "gpu": GPU, "rows": rows}
