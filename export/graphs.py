"""The stage "graphs": the stored weights' form -> three ONNX graphs a bucket -> checks against stored references."""

from __future__ import annotations

from pathlib import Path

import torch

from densegeo.export import checks, forms
from densegeo.export.build_options import BuildOptions
from densegeo.export.build_state import Graphs, State
from densegeo.export.display import Bar
from densegeo.export.graph_stats import describe
from densegeo.export.onnx_graph import export_graph
from densegeo.export.stages import CHECKED_ON, Job
from densegeo.models import vae
from densegeo.models.rewrites import Pipeline
from densegeo.outputs import Decode
from densegeo.precision import PRECISIONS
from densegeo.runtime.bundle import STAGES, Bucket, Check, bucket_name
from densegeo.runtime.verify import alternating
from densegeo.size import Size


@torch.no_grad()
def make_graphs(job: Job, state: State) -> Graphs:
    """Write every bucket's graphs and compare them with the stored references. Raises ExportError."""
    assert state.weights is not None
    options, directory = job.options, state.bundle
    pipeline, references = job.stored_template(), checks.read_inputs(directory)
    if options.graph_form.upsampling == "transposed":
        vae.transpose_upsampling(pipeline.vae.decoder)
    if words := forms.in_words(options):
        job.display.say(f"graphs: {words}")
    batches = (1, *options.batches)
    buckets: list[Bucket] = []
    checked: list[Check] = []
    with job.display.bar("graphs", len(options.sizes) * len(batches) * (len(STAGES) + 1)) as bar:
        for size in options.sizes:
            pipeline.denoiser.resize(size)
            bounds = state.weights.bounds[str(size)]
            for batch in batches:
                bucket = _export_bucket(pipeline, size, batch, directory, bar, options)
                bar.describe(f"checking {bucket.name}")
                checked += _check(directory, bucket, job.decode, references[size], bounds, options.base)
                bar.advance()
                buckets.append(bucket)
    files = state.describe(directory / getattr(bucket, stage).file for bucket in buckets for stage in STAGES)
    return Graphs(key=state.keys.graphs, seconds=0.0, files=files, buckets=buckets, checks=checked)


def _export_bucket(
    pipeline: Pipeline, size: Size, batch: int, directory: Path, bar: Bar, options: BuildOptions
) -> Bucket:
    """Write the three graphs of a size, to which the pipeline is set, for `batch` images at once."""
    name, examples = bucket_name(size, batch), bucket_examples(pipeline, size, batch)
    graphs, exact = {}, PRECISIONS[options.base].exact
    for stage, module in pipeline.stages().items():
        bar.describe(f"{stage} {name}")
        input_spec, output_spec, example = examples[stage]
        weights, path = directory / f"{stage}.safetensors", directory / f"{stage}_{name}.onnx"
        names = input_spec, output_spec
        export_graph(module, example, names, weights, path, exact=exact, norms=options.graph_form.norms)
        graphs[stage] = describe(path)
        bar.advance()
    return Bucket(width=size.width, height=size.height, batch=batch, **graphs)


def bucket_examples(pipeline: Pipeline, size: Size, batch: int) -> dict[str, tuple[str, str, torch.Tensor]]:
    """Of each stage the names of its input and output, and an input of its shape."""
    (width, height), channels = size, pipeline.vae.config.z_channels
    latent = (channels, height // 8, width // 8)
    return {
        "encoder": ("rgb", "latent", torch.zeros(batch, 3, height, width)),
        "denoiser": ("latent", "output", torch.zeros(batch, *latent)),
        "decoder": ("latents", "decoded", torch.zeros(pipeline.decoder_batch * batch, *latent)),
    }


def _check(
    directory: Path,
    bucket: Bucket,
    decode: Decode,
    pictures: list[checks.Outputs],
    bounds: dict[str, float],
    base: str,
) -> list[Check]:
    """Compare a bucket's graphs with the references. Raises ExportError."""
    widen = base not in CHECKED_ON.precisions
    references = alternating(pictures, bucket.batch)
    outputs = checks.graph_outputs(directory, bucket, decode, references, widen=widen)
    reference = "PyTorch float32, rewrites off" + (" (graph widened to float32)" if widen else "")
    return checks.check_bucket(bucket, outputs, references, bounds, reference)
