"""checkpoint -> float32 pipeline -> rewrites -> precision -> three ONNX graphs a bucket -> checks -> bundle."""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress

import densegeo
from densegeo.errors import BundleError, CheckpointError, ConfigError
from densegeo.export import checks, downloads, sources
from densegeo.export.cubins import write_cubins
from densegeo.export.engine_plan import device_plan
from densegeo.export.engines import build_engines, library_version
from densegeo.export.graph_stats import describe
from densegeo.export.onnx_graph import export_graph, write_weights
from densegeo.export.options import BuildOptions
from densegeo.export.plan import Plan, check_resources, make_plan
from densegeo.export.quantization import Quantizer
from densegeo.export.ranges import RangeRecorder
from densegeo.export.reporting import progress_bar, recommend, report
from densegeo.export.staging import publish, staged
from densegeo.models import rewrites
from densegeo.models.config import VAEConfig
from densegeo.models.families import Family
from densegeo.models.loading import Files, open_streamed
from densegeo.models.precision import DTYPES, cast_module
from densegeo.models.presets import preset
from densegeo.models.prompt import write_prompt
from densegeo.models.published import PUBLICATIONS
from densegeo.models.rewrites import Pipeline
from densegeo.models.streaming import BlockFile, write_rewritten
from densegeo.runtime.bundle import (
    CAPTURE,
    SCHEMA_VERSION,
    STAGES,
    Bucket,
    Check,
    Decode,
    FileDigest,
    Manifest,
    Networks,
    Source,
    Verification,
    bucket_name,
    check_files,
    read_manifest,
    sha256_file,
    write_manifest,
)
from densegeo.runtime.verify import PICTURES, alternating

PROMPT_FILE = "prompt.safetensors"
Size = tuple[int, int]  # width, height


def find_files(options: BuildOptions, console: Console) -> tuple[Files, dict[str, str]]:
    """The model's files and where each came from; those that nobody named are fetched from where they are published.

    Raises CheckpointError; see `sources.resolve`.
    """
    directory, row = options.carried_weights, preset(options.model)
    family = row.family
    if directory is None:
        return sources.resolve(options.given, family, _published(options, console))
    given = msgspec.structs.replace(options.given, checkpoint=str(directory), no_lora=options.given.lora is None)
    files, origins = sources.resolve(given, family)
    return files, {role: f"{options.model}: {Path(origin).name}" for role, origin in origins.items()}


def _published(options: BuildOptions, console: Console) -> dict[str, tuple[Path, str]]:
    """The files that the user did not name, role -> (file, origin). Raises CheckpointError."""
    row = PUBLICATIONS[options.model]
    roles = sources.unnamed(options.given, preset(options.model).family)
    if not roles:
        return {}
    if not row.files:
        raise CheckpointError(row.nowhere)
    found = downloads.look(row, roles, offline=options.given.offline)
    downloads.show(found, console)
    return downloads.fetch(row, found, console, any_digest=options.given.any_digest)


def plan_build(options: BuildOptions, files: Files) -> tuple[Quantizer, Plan]:
    """What becomes 8-bit, and what the build does and needs. Raises QuantizationError and CheckpointError."""
    quantizer = Quantizer.load(options.precision, options.base, options.calibration)
    return quantizer, make_plan(
        files,
        list(options.sizes),
        max((1, *options.batches)),
        options.base,
        rewrites.select(files.family.rewrites, options.without),
        quantizer.parameters,
        allow_unexpected=options.allow_unexpected,
    )


def build_bundle(options: BuildOptions, console: Console | None = None) -> Path:
    """Build a bundle and return its directory; nothing is left behind when the build fails or is interrupted.

    Raises ConfigError, CheckpointError, ResourceError and ExportError; see each.
    """
    options = options.validated()
    onnxruntime_version()
    console = console or Console(quiet=True)
    files, origins = find_files(options, console)
    applied = rewrites.select(files.family.rewrites, options.without)
    quantizer, plan = plan_build(options, files)
    with progress_bar(console) as progress:
        size = sum(path.stat().st_size for path in _paths(files))
        task = progress.add_task("reading inputs", total=size, unit="")
        inputs = sources.digests(files, origins, lambda done: progress.advance(task, done))
    quantizer.check(inputs, applied)
    key = build_key(options, inputs, quantizer.digest)
    if (current := _current(options.output, key)) is not None:
        console.print(
            f"{options.output} is up to date: same inputs, options and builder. Nothing to do.", soft_wrap=True
        )
        recommend(current, console)
        return options.output
    check_resources(plan, options.output)
    with staged(options.output) as staging, progress_bar(console) as progress:
        manifest = _build_into(staging, options, files, inputs, key, quantizer, plan, progress)
        write_manifest(staging, manifest)
        publish(staging, options.output)
    needed = (device_plan(plan, size, options.base, max((1, *options.batches))) for size in options.sizes)
    report(manifest, options.output, max(needed, key=lambda one: one.total), console)
    return options.output


def _paths(files: Files) -> list[Path]:
    return list(files.paths.values())


@torch.no_grad()
def _build_into(
    staging: Path,
    options: BuildOptions,
    files: Files,
    inputs: list[Source],
    key: str,
    quantizer: Quantizer,
    plan: Plan,
    progress: Progress,
) -> Manifest:
    family = files.family
    applied = rewrites.select(family.rewrites, options.without)
    of_a_bucket = len(STAGES) * (1 + options.groups) + 1
    of_a_size = 1 + bool(quantizer.layers) + of_a_bucket * (1 + len(options.batches))
    steps = progress.add_task("loading", total=3 + of_a_size * len(options.sizes) + bool(options.architectures))

    def step(what: str) -> None:
        progress.update(steps, description=what, advance=1)

    pipeline, source = open_streamed(files, *options.sizes[0], allow_unexpected=options.allow_unexpected)
    form = copy.deepcopy(plan.form)
    mean = form.vae.decoder.conv_out.out_channels == 1
    references, bounds = _references(pipeline, options, mean, step)

    step("rewriting")
    final = copy.deepcopy(form.denoiser)
    quantizer.apply(final)
    cast_module(final, options.base)
    stored = staging / "denoiser.safetensors"
    write_rewritten(pipeline, source, final, applied, options.base, stored, quantizer)
    rewrites.apply(pipeline, [rewrite for rewrite in applied if rewrite.stage != "denoiser"])
    pipeline.denoiser = form.denoiser
    if options.precision == "fp16":
        _check_fp16(pipeline, stored, next(iter(references.values()))[0])
    pipeline.denoiser = final
    cast_module(pipeline.vae, options.base)
    if quantizer.layers:
        emulated = streamed_copy(pipeline, stored)
        for (width, height), pictures in references.items():
            step(f"emulating {width}x{height}")
            emulated.denoiser.resize(width, height)
            bounds[width, height] = checks.bounds(emulated, pictures[0])
    for size, limits in bounds.items():
        checks.require_finite(limits, bucket_name(*size))
    for stage in ("encoder", "decoder"):
        write_weights(pipeline.stages()[stage], staging / f"{stage}.safetensors")
    step("weights")

    decode = decoding(family, pipeline.vae.config)
    buckets: list[Bucket] = []
    measured: list[Check] = []
    for size in options.sizes:
        pipeline.denoiser.resize(*size)
        for batch in (1, *options.batches):
            bucket = _export_bucket(pipeline, size, batch, staging, step, exact=options.base == "fp32")
            step(f"checking {bucket.name}")
            measured += _check(staging, bucket, decode, references[size], bounds[size], options.base)
            buckets.append(bucket)
    step("writing")
    checks.write_inputs(staging, references)
    write_prompt(pipeline.prompt, staging / PROMPT_FILE)
    contracts = []
    if options.architectures:
        step("compiling kernels")
        contracts = write_cubins(staging, options.architectures)
    engines = []
    if options.backend == "tensorrt":
        building = build_engines(
            staging,
            buckets,
            options.precision,
            options.architectures,
            options.engines,
            old=_older(options.output),
            progress=lambda text: progress.update(steps, description=text),
        )
        for engine in building:
            engines.append(engine)
            step(engine.file)
    names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=options.model,
        precision=options.precision,
        base=options.base,
        quantization=quantizer.record,
        weights_note=preset(options.model).weights_note if options.carried_weights else "",
        buckets=buckets,
        decode=decode,
        networks=Networks(
            family.name,
            msgspec.to_builtins(pipeline.denoiser.config),
            msgspec.to_builtins(pipeline.vae.config),
            PROMPT_FILE,
        ),
        rewrites=[rewrite.name for rewrite in applied],
        files={n: FileDigest((staging / n).stat().st_size, sha256_file(staging / n)) for n in names},
        sources=inputs,
        build_key=key,
        versions=versions(),
        target_architectures=[f"sm_{number}" for number in options.architectures],
        kernels=contracts,
        engines=engines,
        capture=CAPTURE,
        verification=Verification(
            checks.INPUTS_FILE, max(bound for by_output in bounds.values() for bound in by_output.values()), measured
        ),
        choice=options.choice,
    )


def _references(
    pipeline: Pipeline, options: BuildOptions, mean: bool, step: Callable[[str], None]
) -> tuple[dict[Size, list[checks.Outputs]], dict[Size, dict[str, float]]]:
    """Of each size what the float32 pipeline makes of seeded pictures, one or `PICTURES`, and the graphs' bounds."""
    references, bounds = {}, {}
    guidance = pipeline.denoiser.guidance
    pipeline.denoiser.guidance = None  # two identical prompts: the reference needs one
    for width, height in options.sizes:
        step(f"reference {width}x{height}")
        pipeline.denoiser.resize(width, height)
        references[width, height] = [
            checks.reference_outputs(pipeline, checks.seeded_rgb(width, height, seed), mean=mean)
            for seed in range(PICTURES if options.batches else 1)
        ]
        if options.precision in DTYPES:
            low = checks.cast_copy(pipeline, options.precision)
            bounds[width, height] = checks.bounds(low, references[width, height][0])
    pipeline.denoiser.guidance = guidance
    pipeline.denoiser.resize(*options.sizes[0])
    return references, bounds


def _export_bucket(
    pipeline: Pipeline, size: Size, batch: int, staging: Path, step: Callable[[str], None], *, exact: bool
) -> Bucket:
    """Write the three graphs of a size, to which the pipeline is set, for `batch` images at once."""
    (width, height), channels = size, pipeline.vae.config.z_channels
    latent = (channels, height // 8, width // 8)
    name = bucket_name(width, height, batch)
    examples = {
        "encoder": ("rgb", "latent", torch.zeros(batch, 3, height, width)),
        "denoiser": ("latent", "output", torch.zeros(batch, *latent)),
        "decoder": ("latents", "decoded", torch.zeros(pipeline.decoder_batch * batch, *latent)),
    }
    graphs = {}
    for stage, module in pipeline.stages().items():
        step(f"{stage} {name}")
        taken, given, example = examples[stage]
        weights, path = staging / f"{stage}.safetensors", staging / f"{stage}_{name}.onnx"
        export_graph(module, example, (taken, given), weights, path, exact=exact)
        graphs[stage] = describe(path)
    return Bucket(width=width, height=height, batch=batch, **graphs)


def _check(
    staging: Path,
    bucket: Bucket,
    decode: Decode,
    pictures: list[checks.Outputs],
    bounds: dict[str, float],
    base: str,
) -> list[Check]:
    """Compare a bucket's graphs with the references. Raises ExportError."""
    widen = base == "bf16"
    wanted = alternating(pictures, bucket.batch)
    outputs = checks.graph_outputs(staging, bucket, decode, wanted, widen=widen)
    what = "PyTorch float32, rewrites off" + (" (graph widened to float32)" if widen else "")
    return checks.check_bucket(bucket, outputs, wanted, bounds, what)


def decoding(family: Family, vae: VAEConfig) -> Decode:
    """How a family's outputs are to be read."""
    if family.packing == "latent":  # the decoder takes the output as it is
        return Decode(depth_kind=family.depth_kind, packing="latent", clip=family.clip)
    return Decode(
        depth_kind=family.depth_kind,
        clip=family.clip,
        latent_scale=vae.scale_factor,
        latent_shift=vae.shift_factor,
        depth_sign=-1,
        normal_sign=1,
    )


def _check_fp16(pipeline: Pipeline, stored: Path, wanted: checks.Outputs) -> None:
    """Refuse fp16 where the seeded input's magnitudes would overflow; `stored` are the transformer's fp16 weights."""
    streamed = streamed_copy(pipeline, stored)
    recorder = RangeRecorder()
    with recorder.watch(streamed.denoiser, "denoiser"), recorder.watch(streamed.vae, "vae"):
        checks.reference_outputs(streamed, wanted["rgb"])
    recorder.check_fp16()


def streamed_copy(pipeline: Pipeline, stored: Path) -> Pipeline:
    """The same networks, the transformer's stored tensors read when they are needed."""
    streamed = Pipeline(copy.deepcopy(pipeline.denoiser), pipeline.vae, pipeline.prompt)
    streamed.decoder_batch = pipeline.decoder_batch
    source = BlockFile(stored)
    source.fill_outside(streamed.denoiser)
    source.attach(streamed.denoiser)
    return streamed


def versions() -> dict[str, str]:
    """Versions of the builder and of the libraries that shape its output."""
    libraries = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "numpy")
    return {
        "densegeo": densegeo.__version__,
        "python": platform.python_version(),
        "onnxruntime": onnxruntime_version(),
        **{library: metadata.version(library) for library in libraries},
    }


def onnxruntime_version() -> str:
    """ONNX Runtime's version, whichever of its distributions brought it. Raises ConfigError without one."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"A build runs its graphs in ONNX Runtime, which cannot be imported ({error}): "
            'pip install "densegeo[cpu]", or "densegeo[gpu]" (one of the two: they overwrite each other).'
        ) from error
    return str(onnxruntime.__version__)


def build_key(options: BuildOptions, inputs: list[Source], calibration: str) -> str:
    """Digest of everything the bundle depends on: input digests, options, versions, and the builder's own code."""
    code = hashlib.sha256()
    root = Path(densegeo.__file__).parent
    for folder in ("models", "export", "kernels") if options.architectures else ("models", "export"):
        for path in sorted((root / folder).rglob("*.py")):
            code.update(path.read_bytes())
    facts = {
        "schema": SCHEMA_VERSION,
        "options": [
            options.model,
            options.sizes,
            options.batches,
            options.precision,
            options.base,
            calibration,
            options.backend == "tensorrt",
            sorted(options.without),
            options.architectures,
            options.engines if options.backend == "tensorrt" else None,
        ],
        "builder": library_version(options.engines.library) if options.backend == "tensorrt" else "",
        "inputs": [(source.role, source.bytes, source.sha256) for source in inputs],
        "versions": versions(),
        "code": code.hexdigest(),
    }
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


def _current(output: Path, key: str) -> Manifest | None:
    """The bundle that is there, if it is whole and would be made again."""
    try:
        manifest = read_manifest(output)
        check_files(output, manifest, digests=False)
    except BundleError:
        return None
    return manifest if manifest.build_key == key else None


def _older(output: Path) -> tuple[Path, Manifest] | None:
    """The bundle that will be replaced, whose engines may still be current."""
    try:
        return output, read_manifest(output)
    except BundleError:
        return None
