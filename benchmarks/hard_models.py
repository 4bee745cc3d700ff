"""The models that `hard_baselines.py` races: random checkpoints, and the same networks made of diffusers' modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from densegeo.benchmarks import fiffdepth, fullsize
from densegeo.benchmarks.baseline import make_baseline
from densegeo.benchmarks.setups import MID, Setup
from densegeo.export.sources import SourceOptions, resolve
from densegeo.models import chain
from densegeo.models.families import FE2E
from densegeo.models.loading import load_pipeline
from densegeo.size import Size

Image = NDArray[np.uint8]  # (H, W, 3)
Outputs = dict[str, NDArray[np.float32]]  # "prediction" (H, W), "normals" (H, W, 3)
Run = Callable[[Image], Outputs]


@dataclass(frozen=True)
class Diffusers:
    """How diffusers' modules run. channels_last: a pixel's channels are adjacent. compiled: by torch.compile, at the
    first call.
    """

    dtype: torch.dtype
    channels_last: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Model:
    """size: of the race unless another is asked for. write: (folder, narrower) -> a random checkpoint, kept if it is
    there. load: (checkpoint, size, how) -> diffusers' networks with its weights.
    """

    size: Size
    write: Callable[[Path, int], None]
    load: Callable[[Path, Size, Diffusers], Run]


def _write_fe2e(folder: Path, narrower: int) -> None:
    """The middle size: the full autoencoder and a smaller transformer; narrower: a third of that, and half of this."""
    setup = MID if narrower == 1 else _narrower(MID)
    fullsize.write_checkpoint(folder, setup.transformer, setup.vae, setup.tokens, setup.valid)


def _narrower(setup: Setup) -> Setup:
    transformer = msgspec.structs.replace(setup.transformer, hidden_size=256, num_heads=2, mlp_hidden=1024)
    return replace(setup, transformer=transformer, vae=msgspec.structs.replace(setup.vae, ch=setup.vae.ch // 2))


def _load_fe2e(checkpoint: Path, size: Size, how: Diffusers) -> Run:
    """Batch 1, the connector's outputs precomputed."""
    files, _ = resolve(SourceOptions(checkpoint=str(checkpoint)), FE2E)
    pipeline = load_pipeline(files, size)
    modules = make_baseline(pipeline, pipeline.vae.config, dtype=how.dtype, vae_dtype=how.dtype, batch=1)
    baseline, decode, layout = modules.connected(), pipeline.decode, torch.contiguous_format
    if how.channels_last:
        layout = torch.channels_last
        baseline.autoencoder.to(memory_format=layout)
    if how.compiled:
        for module in (baseline.flux, baseline.autoencoder.encoder, baseline.autoencoder.decoder):
            module.compile()

    def run(image: Image) -> Outputs:
        rgb = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 * 2 - 1).to(memory_format=layout)
        maps = chain.assemble(decode, baseline(rgb), size).named()
        return {name: values.numpy() for name, values in maps.items()}

    return run


def _load_fiffdepth(checkpoint: Path, _: Size, how: Diffusers) -> Run:
    options: dict[str, Any] = {"channels_last": how.channels_last, "compiled": how.compiled}
    pipeline = fiffdepth.diffusers_pipeline(checkpoint, how.dtype, **options)
    return lambda image: {"prediction": pipeline(image)}


MODELS = {
    "fiffdepth": Model(Size(512, 512), fiffdepth.write_checkpoint, _load_fiffdepth),
    "fe2e": Model(MID.size, _write_fe2e, _load_fe2e),
}
