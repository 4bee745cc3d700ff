"""The stage "weights": checkpoint -> rewrites -> precision -> weight files. It and "references" read the checkpoint."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from densegeo.export import checks
from densegeo.export.build_state import Bounds, State, Weights
from densegeo.export.display import Display
from densegeo.export.onnx_graph import write_weights
from densegeo.export.ranges import RangeRecorder
from densegeo.export.references import counting_blocks
from densegeo.export.stages import PROMPT_FILE, Job
from densegeo.models import rewrites
from densegeo.models.casting import cast_module
from densegeo.models.denoiser import elements
from densegeo.models.loading import open_streamed
from densegeo.models.prompt import write_prompt
from densegeo.models.rewrites import Pipeline
from densegeo.models.streaming import BlockFile, write_rewritten
from densegeo.precision import PRECISIONS
from densegeo.runtime.bundle import STAGES


@torch.no_grad()
def make_weights(job: Job, state: State) -> Weights:
    """Write the weights of all networks, and the prompt."""
    assert state.references is not None
    options, directory, display = job.options, state.bundle, job.display
    stored, final = directory / "denoiser.safetensors", job.stored_template()
    pipeline, source = open_streamed(job.plan.skeleton, options.sizes[0], allow_unexpected=options.allow_unexpected)
    with display.bar("rewriting", elements(final.denoiser)) as bar:
        write_rewritten(pipeline, source, final.denoiser, job.applied, options.base, stored, job.quantizer, bar.advance)
    rewrites.apply(pipeline, [rewrite for rewrite in job.applied if rewrite.scope.stage != "denoiser"])
    if PRECISIONS[options.precision].overflows:
        _check_fp16(replace(pipeline, denoiser=job.plan.template.denoiser), stored, directory)
    for stage in ("encoder", "decoder"):
        job.quantizer(pipeline.stages()[stage], stage)
    cast_module(pipeline.vae, options.base)
    low = replace(pipeline, denoiser=final.denoiser)
    bounds = _emulated_bounds(low, stored, directory, display) if job.quantizer.layers else state.references.bounds
    for size, limits in bounds.items():
        checks.require_finite(limits, size)
    for stage in ("encoder", "decoder"):
        write_weights(low.stages()[stage], directory / f"{stage}.safetensors")
    write_prompt(low.prompt, directory / PROMPT_FILE)
    written = [directory / name for name in (*(f"{stage}.safetensors" for stage in STAGES), PROMPT_FILE)]
    with display.bar("digests of what was written", sum(path.stat().st_size for path in written)) as bar:
        files = state.describe(written, bar.advance)
    return Weights(key=state.keys.weights, seconds=0.0, files=files, bounds=bounds)


def _emulated_bounds(low: Pipeline, stored: Path, directory: Path, display: Display) -> Bounds:
    """The bounds that the stored 8-bit weights set."""
    bounds, references = Bounds(), checks.read_inputs(directory)
    emulated = streamed_copy(low, stored)
    passes = sum(len(pictures) + 1 for pictures in references.values())
    with (
        display.bar("emulating 8 bits", passes * elements(emulated.denoiser)) as bar,
        counting_blocks(emulated.denoiser, bar) as outside_blocks,
    ):
        for size, pictures in references.items():
            bar.describe(f"emulating {size}")
            emulated.denoiser.resize(size)
            bounds[str(size)] = checks.bounds(emulated, pictures)
            bar.advance((len(pictures) + 1) * outside_blocks)
    return bounds


def _check_fp16(pipeline: Pipeline, stored: Path, directory: Path) -> None:
    """Refuse fp16 where the seeded input's magnitudes would overflow.

    pipeline: rewritten, float32; its denoiser takes the fp16 weights in `stored`.
    """
    (references, *_) = next(iter(checks.read_inputs(directory).values()))
    streamed = streamed_copy(pipeline, stored)
    recorder = RangeRecorder()
    with recorder.watch(streamed.denoiser, "denoiser"), recorder.watch(streamed.vae, "vae"):
        checks.reference_outputs(streamed, references["image"], checks.size_of(references))
    recorder.check_fp16()


def streamed_copy(pipeline: Pipeline, stored: Path) -> Pipeline:
    """The same networks, the denoiser's stored tensors read when they are needed."""
    streamed = replace(pipeline, denoiser=copy.deepcopy(pipeline.denoiser))
    source = BlockFile(stored)
    source.fill_outside(streamed.denoiser)
    source.attach(streamed.denoiser)
    return streamed
