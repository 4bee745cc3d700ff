"""A small FE2E with random weights, plain and in 8 bits, for tests of the torch backend's fused networks."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from densegeo.models import fe2e, rewrites
from densegeo.models.casting import DTYPES, cast
from densegeo.models.layer_plans import LayerPlan, Plans, quantize_block
from densegeo.models.layers import Attention
from densegeo.models.loading import Files, load_pipeline
from densegeo.models.presets import AUTHORS_FILES, write_random_checkpoint
from densegeo.models.quantized import FORMATS, AttentionPlan
from densegeo.models.rewrites import Pipeline
from densegeo.size import Size
from tests.support.checkpoints import SMALL, SMALL_VAE

CONFIG = msgspec.structs.replace(SMALL, depth=2, depth_single_blocks=3)
WIDTH, HEIGHT = 64, 48


def write_checkpoint_files(folder: Path) -> Files:
    """A checkpoint of random weights."""
    write_random_checkpoint(folder, CONFIG, SMALL_VAE, text_tokens=9, valid_tokens=3, seed=2)
    (folder / "config.json").write_text('{"axes_dim": [2, 8, 6]}')
    paths = {role: folder / AUTHORS_FILES[role][0] for role in ("dit", "vae", "prompt")}
    return Files.of("fe2e", **paths, config=folder / "config.json")


def pipeline(files: Files, without: tuple[str, ...], precision: str = "fp32") -> Pipeline:
    loaded = load_pipeline(files, Size(WIDTH, HEIGHT))
    return cast(rewrites.apply(loaded, rewrites.select(fe2e.REWRITES, without)), precision)


def latent() -> Tensor:
    return torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))


def quantized(
    files: Files, kind: str, without: tuple[str, ...], base: str = "fp32", *, attention: bool = False
) -> Pipeline:
    """Every linear of the blocks in 8 bits, or every attention."""
    loaded = pipeline(files, without)
    kind_of_module, plan = (Attention, AttentionPlan(8.0, 8.0, 4.0)) if attention else (nn.Linear, LayerPlan(20.0))
    names = [name for name, module in loaded.denoiser.named_modules() if isinstance(module, kind_of_module)]
    plans: Plans = {name: plan for name in names if loaded.denoiser.quantizable(name)}
    for name, block in loaded.denoiser.blocks():
        quantize_block(block, name, plans, FORMATS[kind], DTYPES[base])
    return cast(loaded, base)
