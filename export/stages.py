"""The stages of a build. Each works on what lies in the bundle's folder and leaves a record there; see `export.state`.

weights: checkpoint -> float32 pipeline -> references -> rewrites -> precision -> weight files. The only one that reads
the checkpoint. graphs: the stored weights' form -> three ONNX graphs a bucket -> checks against the stored references.
kernels and engines: what GPUs run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from densegeo.backends import backend_row
from densegeo.export import checks
from densegeo.export.cubins import write_cubins
from densegeo.export.display import Bar, Display
from densegeo.export.engines import build_engines
from densegeo.export.graph_stats import describe
from densegeo.export.onnx_graph import export_graph, write_weights
from densegeo.export.options import BuildOptions
from densegeo.export.plan import Plan
from densegeo.export.quantization import Quantizer
from densegeo.export.ranges import RangeRecorder
from densegeo.export.state import Engines, Graphs, Kernels, StageRecord, State, Weights
from densegeo.models import rewrites
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.loading import Files, open_streamed
from densegeo.models.precision import cast_module
from densegeo.models.prompt import write_prompt
from densegeo.models.rewrites import Pipeline
from densegeo.models.streaming import BlockFile, write_rewritten
from densegeo.outputs import Decode
from densegeo.precision import PRECISIONS
from densegeo.runtime.backends.tensorrt_kernels import launched
from densegeo.runtime.bundle import KERNELS, STAGES, Bucket, Check, Engine, Manifest, bucket_name
from densegeo.runtime.verify import alternating
from densegeo.size import Size

PROMPT_FILE = "prompt.safetensors"
CHECKED_ON = backend_row("onnxruntime")
Made = TypeVar("Made", bound=StageRecord)
References = dict[Size, list[checks.Outputs]]  # of the pictures of each size
Bounds = dict[str, dict[str, float]]  # as in `state.Weights`


@dataclass(frozen=True)
class Job:
    """What all stages need to know."""

    options: BuildOptions
    files: Files
    quantizer: Quantizer
    plan: Plan
    display: Display

    @property
    def applied(self) -> tuple[rewrites.Rewrite, ...]:
        return rewrites.select(self.files.family.rewrites, self.options.without)

    @property
    def decode(self) -> Decode:
        return self.plan.form.decode

    def stored_form(self) -> Pipeline:
        """The networks as they are stored: rewritten, quantized and cast, without values."""
        form = copy.deepcopy(self.plan.form)
        self.quantizer.apply(form.denoiser)
        cast_module(form.denoiser, self.options.base)
        cast_module(form.vae, self.options.base)
        return form


def run_stage(job: Job, state: State, done: Made | None, make: Callable[[Job, State], Made]) -> Made:
    """A stage's record: that of an interrupted build, or a new one."""
    if done is not None:
        job.display.say(f"{type(done).__name__.lower()}: taken over from an interrupted build")
        return done
    started = time.monotonic()
    made = make(job, state)
    seconds = time.monotonic() - started
    job.display.say(f"{type(made).__name__.lower()}: {seconds:.1f} s")
    return state.keep(msgspec.structs.replace(made, seconds=made.seconds + seconds))


@torch.no_grad()
def make_weights(job: Job, state: State) -> Weights:
    """Write the weights of all stages, the prompt, and the verification's inputs and references."""
    options, directory, display = job.options, state.bundle, job.display
    precision = PRECISIONS[options.precision]
    pipeline, source = open_streamed(job.files, options.sizes[0], allow_unexpected=options.allow_unexpected)
    references, bounds = _references(pipeline, job)
    checks.write_inputs(directory, references)
    final = job.stored_form()
    stored = directory / "denoiser.safetensors"
    with display.bar("rewriting", _elements(final.denoiser)) as bar:
        write_rewritten(pipeline, source, final.denoiser, job.applied, options.base, stored, job.quantizer, bar.advance)
    rewrites.apply(pipeline, [rewrite for rewrite in job.applied if rewrite.scope.stage != "denoiser"])
    if precision.overflows:
        pipeline.denoiser = job.plan.form.denoiser
        _check_fp16(pipeline, stored, next(iter(references.values()))[0])
    pipeline.denoiser = final.denoiser
    cast_module(pipeline.vae, options.base)
    if job.quantizer.layers:
        bounds = _emulated_bounds(pipeline, stored, references, display)
    for size, limits in bounds.items():
        checks.require_finite(limits, size)
    for stage in ("encoder", "decoder"):
        write_weights(pipeline.stages()[stage], directory / f"{stage}.safetensors")
    write_prompt(pipeline.prompt, directory / PROMPT_FILE)
    names = (*(f"{stage}.safetensors" for stage in STAGES), checks.INPUTS_FILE, PROMPT_FILE)
    written = [directory / name for name in names]
    with display.bar("digests of what was written", sum(path.stat().st_size for path in written)) as bar:
        files = state.describe(written, bar.advance)
    return Weights(key=state.keys.weights, seconds=0.0, files=files, bounds=bounds)


def _references(pipeline: Pipeline, job: Job) -> tuple[References, Bounds]:
    """What the float32 pipeline makes of seeded pictures, and the bounds that plain low precision sets."""
    options = job.options
    references: References = {}
    bounds: Bounds = {}
    mean = job.plan.form.vae.decoder.conv_out.out_channels == 1
    pictures = checks.picture_sizes(options.sizes)
    precision = PRECISIONS[options.precision]
    low_too = not precision.quantized and not precision.exact
    guidance = pipeline.denoiser.guidance
    pipeline.denoiser.guidance = None  # two identical prompts: the reference needs one
    passes = sum(map(len, pictures.values())) + 2 * low_too * len(options.sizes)
    with job.display.bar("references", passes * _elements(pipeline.denoiser)) as bar:
        rest = _count_blocks(pipeline.denoiser, bar)
        for size in options.sizes:
            bar.describe(f"reference {size}")
            pipeline.denoiser.resize(size)
            references[size] = []
            for seed, picture in enumerate(pictures[size]):
                image = checks.seeded_picture(picture, seed)
                references[size].append(checks.reference_outputs(pipeline, image, size, mean=mean))
                bar.advance(rest)
            if precision.exact:
                bounds[str(size)] = checks.float32_bounds(references[size][0])
            if low_too:
                low = checks.cast_copy(pipeline, options.precision)
                bounds[str(size)] = checks.bounds(low, references[size][0])
                bar.advance(2 * rest)
    pipeline.denoiser.guidance = guidance
    pipeline.denoiser.resize(options.sizes[0])
    return references, bounds


def _emulated_bounds(pipeline: Pipeline, stored: Path, references: References, display: Display) -> Bounds:
    """The bounds that the stored 8-bit weights set."""
    bounds = {}
    emulated = streamed_copy(pipeline, stored)
    with display.bar("emulating 8 bits", 2 * len(references) * _elements(emulated.denoiser)) as bar:
        rest = _count_blocks(emulated.denoiser, bar)
        for size, pictures in references.items():
            bar.describe(f"emulating {size}")
            emulated.denoiser.resize(size)
            bounds[str(size)] = checks.bounds(emulated, pictures[0])
            bar.advance(2 * rest)
    return bounds


def _elements(denoiser: AnyDenoiser) -> int:
    return sum(tensor.numel() for tensor in denoiser.state_dict().values())


def _count_blocks(denoiser: AnyDenoiser, bar: Bar) -> int:
    """Let the bar advance by each block's elements when it has run; returns how many elements are in no block."""
    rest = _elements(denoiser)
    for _, block in denoiser.blocks():
        count = sum(tensor.numel() for tensor in block.state_dict().values())
        block.register_forward_hook(lambda *_, count=count: bar.advance(count))
        rest -= count
    return rest


def _check_fp16(pipeline: Pipeline, stored: Path, wanted: checks.Outputs) -> None:
    """Refuse fp16 where the seeded input's magnitudes would overflow; `stored` are the transformer's fp16 weights."""
    streamed = streamed_copy(pipeline, stored)
    recorder = RangeRecorder()
    with recorder.watch(streamed.denoiser, "denoiser"), recorder.watch(streamed.vae, "vae"):
        checks.reference_outputs(streamed, wanted["image"], checks.size_of(wanted))
    recorder.check_fp16()


def streamed_copy(pipeline: Pipeline, stored: Path) -> Pipeline:
    """The same networks, the transformer's stored tensors read when they are needed."""
    streamed = replace(pipeline, denoiser=copy.deepcopy(pipeline.denoiser))
    source = BlockFile(stored)
    source.fill_outside(streamed.denoiser)
    source.attach(streamed.denoiser)
    return streamed


@torch.no_grad()
def make_graphs(job: Job, state: State) -> Graphs:
    """Write every bucket's graphs and compare them with the stored references. Raises ExportError."""
    assert state.weights is not None
    options, directory = job.options, state.bundle
    pipeline, references = job.stored_form(), checks.read_inputs(directory)
    batches = (1, *options.batches)
    buckets: list[Bucket] = []
    measured: list[Check] = []
    with job.display.bar("graphs", len(options.sizes) * len(batches) * (len(STAGES) + 1)) as bar:
        for size in options.sizes:
            pipeline.denoiser.resize(size)
            bounds = state.weights.bounds[str(size)]
            for batch in batches:
                bucket = _export_bucket(pipeline, size, batch, directory, bar, exact=PRECISIONS[options.base].exact)
                bar.describe(f"checking {bucket.name}")
                measured += _check(directory, bucket, job.decode, references[size], bounds, options.base)
                bar.advance()
                buckets.append(bucket)
    files = state.describe(directory / getattr(bucket, stage).file for bucket in buckets for stage in STAGES)
    return Graphs(key=state.keys.graphs, seconds=0.0, files=files, buckets=buckets, checks=measured)


def _export_bucket(pipeline: Pipeline, size: Size, batch: int, directory: Path, bar: Bar, *, exact: bool) -> Bucket:
    """Write the three graphs of a size, to which the pipeline is set, for `batch` images at once."""
    name, examples = bucket_name(size, batch), bucket_examples(pipeline, size, batch)
    graphs = {}
    for stage, module in pipeline.stages().items():
        bar.describe(f"{stage} {name}")
        taken, given, example = examples[stage]
        weights, path = directory / f"{stage}.safetensors", directory / f"{stage}_{name}.onnx"
        export_graph(module, example, (taken, given), weights, path, exact=exact)
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
    wanted = alternating(pictures, bucket.batch)
    outputs = checks.graph_outputs(directory, bucket, decode, wanted, widen=widen)
    what = "PyTorch float32, rewrites off" + (" (graph widened to float32)" if widen else "")
    return checks.check_bucket(bucket, outputs, wanted, bounds, what)


def make_kernels(job: Job, state: State) -> Kernels:
    """Compile the kernels of all architectures. Raises KernelError."""
    assert state.graphs is not None
    with job.display.bar("compiling kernels", 1):
        names = launched(job.decode, state.graphs.buckets[0].decoder.outputs[0].shape[1])
        contracts = write_cubins(state.bundle, job.options.architectures, names)
    files = state.describe((state.bundle / KERNELS).iterdir())
    return Kernels(key=state.keys.kernels, seconds=0.0, files=files, contracts=contracts)


def make_engines(job: Job, state: State, old: tuple[Path, Manifest] | None) -> Engines:
    """Build the engines that are missing, and keep each when it is done. Raises EngineError; see `build_engines`.

    old: a bundle whose engines may still be current.
    """
    assert state.graphs is not None
    options, display = job.options, job.display
    record = state.engines or Engines(key=state.keys.engines, seconds=0.0, files={}, engines=[])
    found, wanted = record.engines, []
    started, before = time.monotonic(), record.seconds
    if found:
        display.say(f"engines: {len(found)} taken over from an interrupted build, where they are still wanted")
    with display.bar("engines", len(state.graphs.buckets) * len(STAGES) * options.groups) as bar:
        for engine in build_engines(
            state.bundle,
            state.graphs.buckets,
            options.precision,
            options.architectures,
            options.engines,
            old=old,
            finished=found,
            progress=bar.describe,
        ):
            wanted.append(engine)
            bar.advance()
            record = state.keep(_with_engine(state, record, engine, before + time.monotonic() - started))
    display.say(f"engines: {time.monotonic() - started:.1f} s")
    names = {name for engine in wanted for name in (engine.file, engine.log)}
    files = {name: file for name, file in record.files.items() if name in names}
    return state.keep(msgspec.structs.replace(record, engines=wanted, files=files))


def _with_engine(state: State, record: Engines, engine: Engine, seconds: float) -> Engines:
    """The record with one engine more, in place of the one whose file it took."""
    if engine in record.engines:
        return record
    others = [other for other in record.engines if other.file != engine.file]
    files = record.files | state.describe([state.bundle / engine.file, state.bundle / engine.log])
    return msgspec.structs.replace(record, engines=[*others, engine], files=files, seconds=seconds)
