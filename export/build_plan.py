"""What a build will do and need, from the files' headers alone; stops a build that cannot fit."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from densegeo.errors import CheckpointError, ResourceError
from densegeo.export.blockwise import CHECK_BYTES
from densegeo.export.machine import GIB, available_memory
from densegeo.files import existing_parent
from densegeo.models.checkpoint import KeyReport, compare_keys, lora_ranks, read_lora
from densegeo.models.denoiser import elements
from densegeo.models.loading import Files, Skeleton, open_skeleton, rewritten_template
from densegeo.models.rewrites import Pipeline, Rewrite
from densegeo.models.weight_file import parts
from densegeo.precision import PRECISIONS
from densegeo.size import Size


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; parameters in elements."""

    skeleton: Skeleton
    template: Pipeline  # what is built, without values
    reports: tuple[KeyReport, ...]
    lora_ranks: dict[str, int]
    loaded_parameters: int
    bundle_parameters: int
    bundle_bytes: int
    memory_needed: int
    disk_needed: int
    problems: list[str] = field(default_factory=list)  # in the way of the build


def make_plan(
    files: Files,
    sizes: Sequence[Size],
    batch: int,
    base: str,
    rewrites: tuple[Rewrite, ...],
    saved: int = 0,
    *,
    allow_unexpected: bool,
) -> Plan:
    """Read headers and the prompt, compare keys, estimate memory and disk. Loads no weights but the LoRA's.

    batch: the most images that a graph takes; base: the floating-point type; saved: bytes that quantized weights save.
    """
    skeleton = open_skeleton(files)
    denoiser, vae = skeleton.denoiser, skeleton.vae
    reports = tuple(
        compare_keys(path, entries, module, stored)
        for path, entries, module, stored in zip(
            (files.denoiser, files.vae), skeleton.entries, (denoiser, vae), skeleton.stored, strict=True
        )
    )
    problems = [f"{r.path}: {line}" for r in reports for line in r.problems(allow_unexpected=allow_unexpected)]
    ranks: dict[str, int] = {}
    if files.lora:
        ranks = lora_ranks(files.lora)
        try:
            read_lora(files.lora, denoiser)
        except CheckpointError as error:
            problems.append(str(error))
    template = rewritten_template(files.family, (denoiser.config, vae.config), skeleton.prompt, rewrites, sizes[0])
    loaded, stored_elements = elements(denoiser) + elements(vae), sum(map(elements, template.stages().values()))
    state = denoiser.state_dict()
    outside = sum(tensor.numel() for key, tensor in state.items() if not denoiser.is_block(key)) + elements(vae)
    block = max((elements(module) for _, module in denoiser.blocks()), default=0)
    # A decode's activations: full-size base channels, the pictures of all images, three live tensors.
    activations = 3 * len(template.decode.outputs) * batch * vae.config.ch * max(size.pixels for size in sizes) * 4
    lora = sum(part.stat().st_size for part in parts(files.lora)) if files.lora else 0
    copies = 1 if PRECISIONS[base].exact else 2  # the second is cast, for the error bound
    # One block at a time: as read, merged or folded, and cast. A piece of the graph in its check: as read, widened,
    # handed over, and ONNX Runtime's own.
    stored = PRECISIONS[base].bytes_of(stored_elements) - saved
    piece = 8 * min(CHECK_BYTES, stored)
    working = max(outside * 4 * copies + 3 * block * 4 + lora, piece) + activations
    # Of each size two pictures at most: in its bucket, and with depth and normals at their own size, 9/8 of it.
    references = 2 * sum(size.pixels * (4 * 9 + 4 * 20 // 8 + 25) for size in sizes)
    return Plan(
        skeleton,
        template,
        reports,
        ranks,
        loaded,
        stored_elements,
        stored,
        memory_needed=working + GIB,  # 1 GiB: Python and its libraries
        disk_needed=stored + references + 8 * len(sizes) * (1 << 20),
        problems=problems,
    )


def check_resources(plan: Plan, output: Path, finished: int = 0) -> None:
    """Raise ResourceError when memory or disk are too small for the plan, with the figures and what to do.

    finished: bytes of the bundle that an interrupted build has left.
    """
    memory = available_memory()
    if memory is not None and plan.memory_needed > memory:
        raise ResourceError(
            f"this build needs about {plan.memory_needed / GIB:.1f} GiB of memory, "
            f"{memory / GIB:.1f} GiB are available. Build on a larger machine and copy the bundle here."
        )
    directory = existing_parent(output)
    free = shutil.disk_usage(directory).free
    needed = max(0, plan.disk_needed - finished)
    if needed > free:
        raise ResourceError(
            f"this build needs about {needed / GIB:.1f} GiB on disk, "
            f"{directory} has {free / GIB:.1f} GiB free. Free some space or choose another --output."
        )
    if not os.access(directory, os.W_OK):
        raise ResourceError(f"{directory} cannot be written: choose another --output or change its permissions")


def stage_flops(template: Pipeline, size: Size) -> dict[str, int]:
    """Floating-point operations an image of each stage's products and convolutions; multiply-add = 2.

    template: a pipeline whose values do not matter.
    """
    width, height = size
    networks = copy.deepcopy(template)
    networks.denoiser.resize(size)
    pictures = len(networks.decode.outputs)
    latent = (networks.vae.config.z_channels, height // 8, width // 8)
    inputs = {"encoder": (1, 3, height, width), "denoiser": (1, *latent), "decoder": (pictures, *latent)}
    flops = {}
    for name, network in networks.stages().items():
        with FlopCounterMode(display=False) as counter:
            network.to("meta")(torch.empty(inputs[name], device="meta"))
        flops[name] = counter.get_total_flops()
    return flops
