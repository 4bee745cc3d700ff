"""Full-size FiffDepth on a GPU, with random weights made there: plain modules, compiled ones, and ours.

The plain modules do what diffusers' do (the tests compare them); diffusers' own are measured too where it is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densegeo.benchmarks.gpu_kernels import seconds_of
from densegeo.benchmarks.gpu_models import ERROR_FACTOR, LOW, free, fused_network
from densegeo.benchmarks.setups import SD2_UNET, SD2_VAE, SMALL_UNET, SMALL_VAE
from densegeo.benchmarks.synthetic import random_fiffdepth, random_image
from densegeo.benchmarks.timing import flops
from densegeo.models import casting, fiffdepth, rewrites
from densegeo.models import chain as chain_of
from densegeo.models.chain import relative_error
from densegeo.models.rewrites import Pipeline
from densegeo.runtime.backends.torch_capture import settings
from densegeo.runtime.backends.torch_device import DeviceNetwork
from densegeo.size import Size

Network = Callable[[Tensor], Tensor]  # rgb (N, 3, H, W) -> depth before the clip (N, H, W)
SIDE, GOAL_MS = 512, 12.0  # pixels; DESIGN section 6, on one H100
BATCHES = (1, 2, 4, 8)


def pipeline_on(device: str, small: bool) -> Pipeline:
    """Float32, no rewrite applied, on the device."""
    configs = (SMALL_UNET, SMALL_VAE) if small else (SD2_UNET, SD2_VAE)
    return random_fiffdepth(*configs, SIDE, device)


def chain(pipeline: Pipeline, low: bool) -> Network:
    """The stages in plain torch, all in low precision or float32 inputs as they come."""

    def run(rgb: Tensor) -> Tensor:
        latent = pipeline.vae.encoder(rgb.to(casting.DTYPES[LOW] if low else rgb.dtype))
        return pipeline.vae.decoder(pipeline.denoiser(latent)).mean(1)

    return run


def _channels_last(pipeline: Pipeline) -> Pipeline:
    for network in (pipeline.denoiser, pipeline.vae):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pipeline


def _compiled(pipeline: Pipeline) -> Pipeline:
    for network in pipeline.stages().values():
        network.compile()
    return pipeline


@torch.inference_mode()
def _device_network(folded: Pipeline, side: int, device: str) -> DeviceNetwork:
    """The torch backend's network of one bucket, recorded."""
    return fused_network(folded, Size(side, side), device, captured=True)


def ours(device: str, small: bool) -> DeviceNetwork:
    """Ours in low precision, recorded."""
    return _device_network(_folded(pipeline_on(device, small)), 64 if small else SIDE, device)


def _folded(exact: Pipeline) -> Pipeline:
    return _channels_last(casting.cast(rewrites.apply(exact, fiffdepth.REWRITES), LOW))


@torch.inference_mode()
@settings()
def compare(
    device: str, small: bool, runs: int, seconds_left: Callable[[], float], *, compiled: bool
) -> dict[str, Any]:
    """Milliseconds of every contender at 512x512, and an image of batches of ours; wrong numbers get no speed."""
    side = 64 if small else SIDE
    rgb = random_image(side, side, seed=2).to(device)
    exact = pipeline_on(device, small)
    reference = chain(exact, low=False)(rgb)
    plain = casting.cast(copy.deepcopy(exact), LOW)
    limit = ERROR_FACTOR * relative_error(chain(plain, low=True)(rgb), reference)
    folded = _folded(exact)
    contenders: dict[str, Callable[[], Network]] = {
        "plain, bf16, eager": lambda: chain(plain, low=True),
        "plain, bf16, compiled": lambda: chain(_compiled(_channels_last(copy.deepcopy(plain))), low=True),
        "folded, eager": lambda: chain(folded, low=True),
        "folded, compiled": lambda: chain(_compiled(copy.deepcopy(folded)), low=True),
        "folded, kernels, graph": lambda: _means(_device_network(folded, side, device)),
    }
    rows: dict[str, Any] = {}
    for name, make in contenders.items():
        if name.endswith("compiled") and not compiled:
            continue
        if seconds_left() < 60:
            rows[name] = {"skipped": "no time left"}
            continue
        network = make()
        error = relative_error(network(rgb), reference)
        if not error <= limit:
            rows[name] = {"failed": f"its error is {error:.1e}, the limit {limit:.1e}"}
            continue
        seconds = sorted(seconds_of(partial(network, rgb), device, runs))
        rows[name] = {"ms": 1e3 * seconds[len(seconds) // 2], "ms_min": 1e3 * seconds[0], "error": error}
        del network
        free(device)
    work = flops(partial(chain_of.decode, folded, torch.zeros(1, 4, side // 8, side // 8, device=device)))
    work += flops(partial(chain_of.denoise, folded, torch.zeros(1, 4, side // 8, side // 8, device=device)))
    work += flops(partial(chain_of.encode, folded, rgb))
    for row in rows.values():
        if "ms" in row:
            row["tflop_per_s_of_folded_work"] = work / row["ms"] / 1e9
    report = {"side": side, "folded_tflop": work / 1e12, "goal_ms": GOAL_MS, "limit": limit, "contenders": rows}
    return report | {
        "ms an image of a batch": _batches(_device_network(folded, side, device), rgb, device, runs, seconds_left)
    }


def _means(network: DeviceNetwork) -> Network:
    replay = network.recorded(1)
    return lambda rgb: replay(rgb).mean(1)


def _batches(
    network: DeviceNetwork, rgb: Tensor, device: str, runs: int, seconds_left: Callable[[], float]
) -> dict[str, float]:
    milliseconds = {}
    for count in BATCHES:
        if seconds_left() > 45:
            replay, images = network.recorded(count), rgb.repeat(count, 1, 1, 1)
            seconds = sorted(seconds_of(partial(replay, images), device, runs))
            milliseconds[str(count)] = 1e3 * seconds[len(seconds) // 2] / count
    return milliseconds
