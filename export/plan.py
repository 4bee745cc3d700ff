"""What a build will do and need, from the files' headers alone; stops a build that cannot fit."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from densegeo.errors import CheckpointError, ResourceError
from densegeo.export.blockwise import CHECK_BYTES
from densegeo.models.checkpoint import KeyReport, compare_keys, lora_ranks, read_lora
from densegeo.models.config import TransformerConfig
from densegeo.models.loading import Files, Skeleton, checked_prompt, open_skeleton
from densegeo.models.prompt import Prompt
from densegeo.models.rewrites import Rewrite
from densegeo.models.streaming import blocks_of, is_block

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; parameters in elements."""

    skeleton: Skeleton
    prompt: Prompt
    reports: tuple[KeyReport, ...]
    lora_ranks: dict[str, int]
    loaded_parameters: int
    bundle_parameters: int
    bundle_bytes: int
    text_tokens: int  # in the graph, after merging
    memory_needed: int
    disk_needed: int
    problems: list[str] = field(default_factory=list)  # in the way of the build


def _elements(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def dropped_parameters(config: TransformerConfig, rewrites: tuple[Rewrite, ...], skeleton: Skeleton) -> int:
    """Parameters that folding removes (DESIGN 4.2 and 4.3); the constants that replace them are small."""
    names = {rewrite.name for rewrite in rewrites}
    state = skeleton.transformer.state_dict()
    prefixes: list[str] = []
    if "modulation" in names:
        prefixes += ["time_in.", "vector_in.", "final_layer.adaLN_modulation."]
    if "connector" in names:
        prefixes += ["connector.", "txt_in."]

    def dropped(key: str) -> bool:
        folded = "modulation" in names and any(part in key for part in ("_mod.lin.", ".modulation.lin."))
        return folded or key.startswith(tuple(prefixes))

    return sum(tensor.numel() for key, tensor in state.items() if dropped(key))


def make_plan(
    files: Files,
    sizes: list[tuple[int, int]],
    base: str,
    rewrites: tuple[Rewrite, ...],
    eight_bit: int = 0,
    *,
    allow_unexpected: bool,
) -> Plan:
    """Read headers and the prompt, compare keys, estimate memory and disk. Loads no weights but the LoRA's.

    base: the floating-point type; eight_bit: parameters that are stored in 8 bits instead.
    """
    skeleton = open_skeleton(files)
    config = skeleton.transformer.config
    prompt = checked_prompt(files.prompt, config)
    modules = {"dit": skeleton.transformer, "vae": skeleton.vae}
    reports = tuple(compare_keys(getattr(files, role), skeleton.entries[role], modules[role]) for role in modules)
    problems = [f"{r.path}: {line}" for r in reports for line in r.problems(allow_unexpected=allow_unexpected)]
    ranks: dict[str, int] = {}
    if files.lora:
        ranks = lora_ranks(files.lora)
        try:
            read_lora(files.lora, skeleton.transformer)
        except CheckpointError as error:
            problems.append(str(error))
    loaded = _elements(skeleton.transformer) + _elements(skeleton.vae)
    kept = loaded - dropped_parameters(config, rewrites, skeleton)
    merging = any(rewrite.name == "padding" for rewrite in rewrites)
    text_tokens = len(prompt.merge_padding()[0]) if merging else len(prompt.mask)
    state = skeleton.transformer.state_dict()
    outside = sum(tensor.numel() for key, tensor in state.items() if not is_block(key)) + _elements(skeleton.vae)
    block = max(_elements(module) for _, module in blocks_of(skeleton.transformer))
    # A decode's activations: full-size base channels, two pictures, three live tensors.
    activations = max(3 * 2 * skeleton.vae.config.ch * width * height * 4 for width, height in sizes)
    lora = files.lora.stat().st_size if files.lora else 0
    copies = 1 if base == "fp32" else 2  # the second is cast, for the error bound
    # One block at a time: as read, merged or folded, and cast. A piece of the graph in its check: as read, widened,
    # handed over, and ONNX Runtime's own.
    stored = kept * ITEM_BYTES[base] - eight_bit * (ITEM_BYTES[base] - 1)
    piece = 8 * min(CHECK_BYTES, stored)
    working = max(outside * 4 * copies + 3 * block * 4 + lora, piece) + activations
    references = sum((9 * width * height + 20 * width * height // 8) * 4 for width, height in sizes)
    return Plan(
        skeleton,
        prompt,
        reports,
        ranks,
        loaded,
        kept,
        stored,
        text_tokens,
        memory_needed=working + GIB,  # 1 GiB: Python and its libraries
        disk_needed=stored + references + 8 * len(sizes) * (1 << 20),
        problems=problems,
    )


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            entries = dict(line.split(":", 1) for line in file)
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_resources(plan: Plan, output: Path) -> None:
    """Raise ResourceError when memory or disk are too small for the plan, with the figures and what to do."""
    memory = available_memory()
    if memory is not None and plan.memory_needed > memory:
        raise ResourceError(
            f"this build needs about {plan.memory_needed / GIB:.1f} GiB of memory, "
            f"{memory / GIB:.1f} GiB are available. Build on a larger machine and copy the bundle here."
        )
    directory = existing_parent(output)
    free = shutil.disk_usage(directory).free
    if plan.disk_needed > free:
        raise ResourceError(
            f"this build needs about {plan.disk_needed / GIB:.1f} GiB on disk, "
            f"{directory} has {free / GIB:.1f} GiB free. Free some space or choose another --output."
        )
    if not os.access(directory, os.W_OK):
        raise ResourceError(f"{directory} cannot be written: choose another --output or change its permissions")


def existing_parent(path: Path) -> Path:
    """The nearest ancestor that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path if path.is_dir() else path.parent


def transformer_flops(config: TransformerConfig, text_tokens: int, image_tokens: int) -> int:
    """Floating-point operations of the blocks for one run: linears and attention, multiply-add = 2."""
    hidden, mlp, tokens = config.hidden_size, config.mlp_hidden, text_tokens + image_tokens
    per_token = (4 * hidden + 2 * mlp) * hidden  # attention's four projections and the MLP's two
    blocks = config.depth + config.depth_single_blocks
    return 2 * blocks * (per_token * tokens + 2 * tokens * tokens * hidden)


def latent_tokens(sizes: list[tuple[int, int]]) -> list[int]:
    """Image tokens (both halves) of each size."""
    return [2 * math.prod((width // 16, height // 16)) for width, height in sizes]
