"""Full-size FE2E on a GPU, with random weights made there: what the authors' code does, a hard baseline, and ours."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from densegeo.benchmarks.gpu_kernels import seconds_of
from densegeo.benchmarks.setups import FULL, MID, SMOKE, Setup
from densegeo.benchmarks.synthetic import random_image, random_pipeline, random_prompt
from densegeo.benchmarks.timing import flops
from densegeo.models import casting, chain, fe2e, rewrites
from densegeo.models.chain import relative_error
from densegeo.models.layer_plans import LayerPlan, quantize_block
from densegeo.models.layers import Attention
from densegeo.models.quantized import FORMATS, AttentionPlan
from densegeo.models.rewrites import Pipeline
from densegeo.models.transformer import Transformer
from densegeo.models.vae import VAE
from densegeo.runtime.backends.torch_capture import CudaRecorder, settings
from densegeo.runtime.backends.torch_device import DeviceNetwork
from densegeo.runtime.backends.torch_fused import fuse
from densegeo.runtime.backends.torch_modules import resized
from densegeo.runtime.backends.torch_pictures import fuse_pictures
from densegeo.runtime.bundle import Bucket, Graph
from densegeo.size import Size

LOW = "bf16"
ERROR_FACTOR = 2.0  # of plain eager low precision's error against float32 (DESIGN section 10)
WARM_UP = 2

Network = Callable[[Tensor], Tensor]  # rgb (1, 3, H, W) -> decoded (2, 3, H, W)


@dataclass
class Weights:
    """One set of weights: not rewritten, the transformer in low precision, the autoencoder in both."""

    setup: Setup
    plain: Pipeline
    vae: VAE  # float32
    device: str


def make_weights(small: bool, device: str) -> Weights:
    """Random weights on the device; SMOKE's size when `small`."""
    setup, dtype = SMOKE if small else FULL, casting.DTYPES[LOW]
    prompt = random_prompt(setup.tokens, setup.valid, setup.transformer.prompt_dim, seed=0)
    plain = random_pipeline(setup.transformer, setup.vae, prompt, setup.size, seed=1, device=device, dtype=dtype)
    vae = copy.deepcopy(plain.vae).float()
    casting.cast(plain, LOW)
    return Weights(setup, plain, vae, device)


def folded(weights: Weights, size: Size) -> Pipeline:
    """A rewritten copy at another size, on the device."""
    pipeline = copy.deepcopy(weights.plain)
    pipeline.denoiser.resize(size)
    rewrites.apply(pipeline, fe2e.REWRITES)
    casting.cast(pipeline, LOW)
    pipeline.denoiser.to(weights.device)
    pipeline.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pipeline


def authors(weights: Weights, size: Size) -> Network:
    """What the released code does: batch of two, the whole connector, a float32 autoencoder, two decodes; eager."""
    network = _chain(replace(_resized(weights, size), vae=weights.vae), torch.float32)

    def run(rgb: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):  # torch's default for these
            return network(rgb)

    return run


def hard(weights: Weights, size: Size) -> Network:
    """Batch 1, everything in low precision, and torch.compile on every block and on the autoencoder."""
    vae = copy.deepcopy(weights.plain.vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pipeline = replace(_resized(weights, size), vae=vae)
    pipeline.denoiser.guidance = None
    _compile(pipeline)
    return _chain(pipeline, casting.DTYPES[LOW])


def _resized(weights: Weights, size: Size) -> Pipeline:
    """The plain pipeline at another size, sharing its weights."""
    return replace(weights.plain, denoiser=resized(weights.plain.denoiser, size))


def _compile(pipeline: Pipeline) -> None:
    blocks = (block for _, block in pipeline.denoiser.blocks())
    for block in [*blocks, pipeline.vae.encoder, pipeline.vae.decoder]:
        block.compile()


def _chain(pipeline: Pipeline, vae_dtype: torch.dtype) -> Network:
    """The stages one by one, eager but for what was compiled."""
    return lambda rgb: chain.run(pipeline, rgb.to(vae_dtype), Size(rgb.shape[3], rgb.shape[2]))


def contenders(weights: Weights, size: Size, rgb: Tensor) -> dict[str, Callable[[], Network]]:
    """Name -> what makes the network; each is made, measured and dropped in turn, because memory is limited.

    The authors' comes first, because others are compared with it, and those that torch compiles, in minutes, come last.
    """

    def plain_folded(compiled: bool) -> Network:
        pipeline = folded(weights, size)
        if compiled:
            _compile(pipeline)
        return _chain(pipeline, casting.DTYPES[LOW])

    def ours(captured: bool, fp8: bool = False, attention: bool = False) -> Network:
        return device_network(weights, size, captured, rgb if fp8 else None, attention=attention).recorded(1)

    return {
        "authors, eager": lambda: authors(weights, size),
        "folded, kernels, graph": lambda: ours(True),
        "folded, kernels, graph, fp8": lambda: ours(True, True),
        "folded, kernels, graph, fp8 with attention": lambda: ours(True, True, True),
        "folded, kernels": lambda: ours(False),
        "folded, eager": lambda: plain_folded(False),
        "batch 1, bf16, compiled": lambda: hard(weights, size),
        "folded, compiled": lambda: plain_folded(True),
    }


def device_network(
    weights: Weights,
    size: Size,
    captured: bool,
    fp8_on: Tensor | None = None,
    *,
    attention: bool = False,
) -> DeviceNetwork:
    """The torch backend's network of one bucket. fp8_on: a picture whose largest activations are fp8's ranges."""
    pipeline = folded(weights, size)
    if fp8_on is not None:
        to_fp8(pipeline, fp8_on, attention=attention)
    return fused_network(pipeline, size, weights.device, captured)


def fused_network(pipeline: Pipeline, size: Size, device: str, captured: bool) -> DeviceNetwork:
    """The torch backend's network of one bucket, from a folded pipeline on the device."""
    none = Graph(file="", inputs=[], outputs=[], nodes=0, parameters=0, flops=0)
    recorder = CudaRecorder(device) if captured and device != "cpu" else None
    fused = replace(pipeline, vae=fuse_pictures(pipeline.vae), denoiser=fuse(pipeline.denoiser))
    return DeviceNetwork(fused, Bucket(*size, none, none, none), device, recorder)


@torch.inference_mode()
def to_fp8(pipeline: Pipeline, rgb: Tensor, *, attention: bool) -> None:
    """Quantize all linears of the blocks in place, and attentions; ranges by one picture: for speed, not accuracy."""
    denoiser, plans = pipeline.denoiser, dict[str, LayerPlan | AttentionPlan]()

    def note(name: str, kind: type[nn.Module], arguments: tuple[Tensor, ...]) -> None:
        amax = [float(x.abs().max()) for x in arguments[:3]]
        plans[name] = AttentionPlan(*amax) if kind is Attention else LayerPlan(amax[0])

    kinds = (nn.Linear, Attention) if attention else (nn.Linear,)
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: note(name, type(module), inputs))
        for name, layer in denoiser.named_modules()
        if isinstance(layer, kinds) and Transformer.is_block(name)
    ]
    denoiser(pipeline.vae.encoder(rgb.to(casting.DTYPES[LOW])))
    for handle in handles:
        handle.remove()
    for name, block in denoiser.blocks():
        quantize_block(block, name, plans, FORMATS["fp8"], casting.DTYPES[LOW])


@torch.inference_mode()
@settings()
def errors(device: str, small: bool) -> dict[str, Any]:
    """Relative error of the decoded pictures against float32: of plain low precision, and of ours as it is run.

    "fp8" holds for each of its variants the error of its emulation on the CPU, and of ours.
    """
    setup = SMOKE if small else MID
    size, rgb = setup.size, setup.image().to(device)
    exact = setup.pipeline()
    exact.denoiser.to(device)
    exact.vae.to(device)
    reference = _chain(exact, torch.float32)(rgb)
    weights = Weights(setup, casting.cast(exact, LOW), exact.vae, device)
    plain = _chain(weights.plain, casting.DTYPES[LOW])(rgb)
    network = device_network(weights, size, captured=True).recorded(1)
    ours, again = network(rgb).clone(), network(rgb)
    fp8 = {}
    for name, attention in (("linears", False), ("linears and attention", True)):
        low = device_network(weights, size, True, rgb, attention=attention).recorded(1)
        decoded_by = {"plain": emulated(weights, size, rgb, attention=attention), "ours": low(rgb)}
        fp8[name] = {way: relative_error(decoded, reference) for way, decoded in decoded_by.items()}
    return {
        "plain": relative_error(plain, reference),
        "ours": relative_error(ours, reference),
        "captured": float(network.captured),
        "repeated_exactly": float(torch.equal(ours, again)),
        "fp8": fp8,
    }


def emulated(weights: Weights, size: Size, rgb: Tensor, *, attention: bool) -> Tensor:
    """What fp8 gives by the plain modules on the CPU, which multiply 8-bit numbers as floats; on rgb's device."""
    pipeline = folded(weights, size)
    to_fp8(pipeline, rgb, attention=attention)
    for network in (pipeline.denoiser, pipeline.vae):
        network.cpu()
    return _chain(pipeline, casting.DTYPES[LOW])(rgb.cpu()).to(rgb.device)


class Comparison:
    """Milliseconds of every contender at one size, and how far its output is from the authors' way.

    left: seconds that may still be used; contenders that no longer fit are listed as skipped.
    """

    def __init__(self, weights: Weights, size: Size, runs: int, seconds_left: Callable[[], float]) -> None:
        self._weights, self._size, self._runs, self._seconds_left = weights, size, runs, seconds_left
        self._rgb = random_image(*size, seed=2).to(weights.device)
        self._reference: Tensor | None = None
        self._rows: dict[str, Any] = {}

    @torch.inference_mode()
    @settings()
    def measure(self, *, compiled: bool) -> None:
        """Those that torch compiles, or the others, which come first."""
        for name, make in contenders(self._weights, self._size, self._rgb).items():
            if name.endswith("compiled") != compiled:
                continue
            if self._seconds_left() < 60:
                self._rows[name] = {"skipped": "no time left"}
                continue
            try:
                row, decoded = _measure(make, self._rgb, self._weights.device, self._runs)
                self._reference = decoded if self._reference is None else self._reference
                self._rows[name] = {**row, "relative_to_authors": relative_error(decoded, self._reference)}
            except (RuntimeError, torch.OutOfMemoryError) as error:
                self._rows[name] = {"failed": str(error)[:300]}
            free(self._weights.device)

    @torch.inference_mode()
    def report(self) -> dict[str, Any]:
        """The figures so far; rates are of the folded work, which is the least."""
        work = flops(partial(_chain(folded(self._weights, self._size), casting.DTYPES[LOW]), self._rgb))
        for row in self._rows.values():
            if "ms" in row:
                row["tflop_per_s_of_folded_work"] = work / row["ms"] / 1e9
        return {"size": list(self._size), "folded_tflop": work / 1e12, "contenders": self._rows}


def _measure(make: Callable[[], Network], rgb: Tensor, device: str, runs: int) -> tuple[dict[str, float], Tensor]:
    """Milliseconds of a network that lives for this call only, and its output."""
    network = make()
    decoded = network(rgb).clone()
    seconds = sorted(seconds_of(partial(network, rgb), device, runs, WARM_UP))
    names = {"ms": seconds[len(seconds) // 2], "ms_min": seconds[0], "ms_max": seconds[-1]}
    return {name: 1e3 * value for name, value in names.items()}, decoded


def free(device: str) -> None:
    """Give back what is no longer used."""
    gc.collect()
    torch._dynamo.reset()
    if device != "cpu":
        torch.cuda.empty_cache()
