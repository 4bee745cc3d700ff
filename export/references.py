"""The stage "references": what the float32 checkpoint, without rewrites, makes of seeded pictures, and error bounds.

Reads the checkpoint block by block, with a pipeline of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from densegeo.export import checks
from densegeo.export.build_state import Bounds, References, State
from densegeo.export.display import Bar
from densegeo.export.stages import Job
from densegeo.models.denoiser import AnyDenoiser, elements
from densegeo.models.loading import open_streamed
from densegeo.precision import PRECISIONS
from densegeo.size import Size


@torch.no_grad()
def make_references(job: Job, state: State) -> References:
    """Write the verification's pictures and what becomes of them; the bounds are those of plain low precision."""
    options = job.options
    precision = PRECISIONS[options.precision]
    pipeline, _ = open_streamed(job.plan.skeleton, options.sizes[0], allow_unexpected=options.allow_unexpected)
    pipeline.denoiser.guidance = None  # two identical prompts: the reference needs one
    low_too = not precision.quantized and not precision.exact
    mean = job.plan.template.vae.decoder.conv_out.out_channels == 1
    pictures, outputs_of, bounds = checks.picture_sizes(options.sizes), dict[Size, list[checks.Outputs]](), Bounds()
    count = sum(map(len, pictures.values()))
    passes = count + low_too * (count + len(options.sizes))  # `checks.bounds`: each picture, and the first one's stages
    with (
        job.display.bar("references", passes * elements(pipeline.denoiser)) as bar,
        counting_blocks(pipeline.denoiser, bar) as outside_blocks,
    ):
        for size in options.sizes:
            bar.describe(f"reference {size}")
            pipeline.denoiser.resize(size)
            outputs_of[size] = []
            for seed, picture in enumerate(pictures[size]):
                image = checks.seeded_picture(picture, seed)
                outputs_of[size].append(checks.reference_outputs(pipeline, image, size, mean=mean))
                bar.advance(outside_blocks)
            if precision.exact:
                bounds[str(size)] = checks.float32_bounds(outputs_of[size][0])
            if low_too:
                low = checks.cast_copy(pipeline, options.precision)
                bounds[str(size)] = checks.bounds(low, outputs_of[size])
                bar.advance((len(outputs_of[size]) + 1) * outside_blocks)
    checks.write_inputs(state.bundle, outputs_of)
    files = state.describe([state.bundle / checks.INPUTS_FILE])
    return References(key=state.keys.references, seconds=0.0, files=files, bounds=bounds)


@contextmanager
def counting_blocks(denoiser: AnyDenoiser, bar: Bar) -> Iterator[int]:
    """Meanwhile the bar advances by each block's elements when it has run; gives how many elements are in none."""
    outside_blocks, handles = elements(denoiser), []
    for _, block in denoiser.blocks():
        count = elements(block)
        handles.append(block.register_forward_hook(lambda *_, count=count: bar.advance(count)))
        outside_blocks -= count
    try:
        yield outside_blocks
    finally:
        for handle in handles:
            handle.remove()
