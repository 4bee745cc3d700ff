"""What each layer has to do for one image, counted without values: what a plan weighs errors against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from densegeo.models.layers import Attention
from densegeo.models.rewrites import Pipeline, stage_of
from densegeo.size import Size

Count = Callable[[Any, tuple[Tensor, ...], Tensor], int]  # layer, what it takes, what it gives -> multiply-adds


def multiply_adds(pipeline: Pipeline, size: Size) -> dict[str, int]:
    """Of every linear, convolution and attention of a pipeline, for an image of the size that it is set to.

    The names are those of `Pipeline.layers`. Nothing is computed, and blocks that lie in a file stay there.
    """
    height, width = size.height // 8, size.width // 8
    latent = (1, pipeline.vae.config.z_channels, height, width)
    input_shapes = {
        "encoder": (1, 3, size.height, size.width),
        "denoiser": latent,
        "decoder": (len(pipeline.decode.outputs), *latent[1:]),
    }
    counts: dict[str, int] = {}
    for stage, network in pipeline.stages().items():
        prefix = "" if stage == stage_of("") else f"{stage}."
        twin = _without_values(network)
        for name, layer in twin.named_modules():
            for kind, count in _COUNTS:
                if isinstance(layer, kind):
                    layer.register_forward_hook(_adding_to(counts, prefix + name, count))
        with torch.no_grad():
            twin(torch.empty(input_shapes[stage], device="meta"))
    return counts


def _adding_to(counts: dict[str, int], name: str, count: Count) -> Callable[..., None]:
    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts[name] = counts.get(name, 0) + count(layer, inputs, output)

    return note


def _of_linear(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    return output.numel() * layer.in_features


def _of_convolution(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    return output.numel() * math.prod(layer.weight.shape[1:])


def _of_attention(layer: Attention, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Of its two products."""
    queries, keys = inputs[0], inputs[1]
    return 2 * queries.numel() * keys.shape[2]


_COUNTS: tuple[tuple[type[nn.Module], Count], ...] = (
    (nn.Linear, _of_linear),
    (nn.Conv2d, _of_convolution),
    (Attention, _of_attention),
)


def _without_values(network: nn.Module) -> nn.Module:
    """A copy on the meta device that fills nothing when it runs."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.deepcopy(network, memo)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return twin
