"""What engines will need: memory of the builder here, and of the GPU that runs them, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from densegeo.errors import ResourceError
from densegeo.export.build_plan import Plan
from densegeo.export.engine_builder import BUILD_BASE, EngineOptions, choose_weights, constant_memory, memory_limit
from densegeo.export.machine import GIB
from densegeo.export.onnx_graph import query_chunks
from densegeo.precision import PRECISIONS
from densegeo.size import Size

CARDS = (24, 48, 80)  # GiB: workstation, professional and data-centre GPUs
CONTEXT = GIB // 2  # of the CUDA driver and the libraries
BASE = 16 << 20  # workspace of any engine


@dataclass(frozen=True)
class DevicePlan:
    """Bytes on the GPU: one copy of the weights, and one workspace that the three engines share."""

    weights: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.workspace + CONTEXT


def device_plan(plan: Plan, size: Size, base: str, batch: int = 1) -> DevicePlan:
    """Estimate for one bucket: tensors that live at once in a block, in the widest decoder level, in its attention."""
    vae, pictures = plan.template.vae.config, len(plan.template.decode.outputs) * batch
    item = PRECISIONS[base].bytes_of(1)
    denoiser = item * batch * plan.template.denoiser.live_features(size)
    picture = pictures * vae.ch * size.pixels  # at full resolution: half of the last level in float32
    pixels = (size.width // 8) * (size.height // 8)
    logits = pictures * pixels**2 // query_chunks(pixels, pixels, vae.ch * vae.ch_mult[-1])
    decoder = max(picture * (2 * item + 8), logits * (4 + item))
    return DevicePlan(plan.bundle_bytes, max(denoiser, decoder) + BASE)


def card_verdict(needed: DevicePlan, card_gib: int) -> str:
    """Whether a bucket fits a card, or how much of the weights would have to be streamed."""
    spare = card_gib * GIB - needed.total
    if spare >= 0:
        return f"fits, {spare / GIB:.1f} GiB to spare"
    if needed.workspace + CONTEXT < card_gib * GIB:
        return f"needs --weight-streaming of {-spare / GIB:.1f} GiB"
    return "does not fit: choose a smaller --size"


def builder_line(plan: Plan, options: EngineOptions) -> str:
    """What the builder will do with the weights and need; raises ResourceError if it cannot be had."""
    weights_as = choose_weights(options, plan.bundle_bytes)
    limit = memory_limit(options)
    needed = constant_memory(plan.bundle_bytes) if weights_as == "constant" else 2 * BUILD_BASE
    if limit is not None and needed > limit:
        raise ResourceError(
            f"building engines needs about {needed / GIB:.1f} GiB of memory, {limit / GIB:.1f} GiB can be had: "
            "build on a larger machine and copy the bundle here"
        )
    place = (
        "inside the engines" if weights_as == "constant" else "inputs of the engines, from the bundle's weight files"
    )
    return f"engines: {options.library}, weights {place}; the builder needs about {needed / GIB:.1f} GiB"
