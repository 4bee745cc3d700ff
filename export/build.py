"""checkpoint -> float32 pipeline -> rewrites -> precision -> three ONNX graphs a bucket -> checks -> bundle."""

from __future__ import annotations

import copy
import hashlib
import platform
from importlib import metadata
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress

import densegeo
from densegeo.errors import BundleError, ConfigError
from densegeo.export import checks, quantization, sources
from densegeo.export.cubins import check_architectures, write_cubins
from densegeo.export.engines import EngineOptions, build_engines, library_version, target_groups
from densegeo.export.graph_stats import describe
from densegeo.export.onnx_graph import export_graph, write_weights
from densegeo.export.plan import Plan, check_resources, make_plan
from densegeo.export.quantization import Quantizer
from densegeo.export.ranges import RangeRecorder
from densegeo.export.reporting import progress_bar, report
from densegeo.export.staging import publish, staged
from densegeo.models import rewrites
from densegeo.models.config import VAEConfig
from densegeo.models.families import Family
from densegeo.models.loading import Files, open_streamed, rewritten_form
from densegeo.models.precision import BASES, DTYPES, cast_module
from densegeo.models.presets import preset
from densegeo.models.prompt import write_prompt
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
    check_files,
    read_manifest,
    sha256_file,
    write_manifest,
)

BACKENDS = ("onnxruntime", "tensorrt")
PROMPT_FILE = "prompt.safetensors"
SMALLEST = 32  # pixels of a bucket's side


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to build. sizes: (width, height) buckets."""

    model: str
    output: Path
    given: sources.Given = sources.Given()
    sizes: tuple[tuple[int, int], ...] = ()  # empty: the model's default
    precision: str = "fp32"
    base: str = ""  # what fp8 and int8 leave in floating point; empty: bf16
    any_size: bool = False  # take sides that are no multiples of the model's unit, if the model can
    calibration: Path | None = None  # the directory of `densegeo calibrate`, for fp8 and int8
    backend: str = "onnxruntime"
    without: tuple[str, ...] = ()  # rewrites to leave out
    allow_unexpected: bool = False
    architectures: tuple[int, ...] = ()  # GPU architectures to build kernels and engines for: 89 is sm_89
    engines: EngineOptions = EngineOptions()  # of the tensorrt backend

    def validated(self) -> BuildOptions:
        """The options with defaults filled in; raises ConfigError for an invalid one."""
        row = preset(self.model)
        if self.precision not in BASES:
            raise ConfigError(f"there is no precision {self.precision!r}; there are {', '.join(BASES)}")
        base = quantization.checked_base(self.precision, self.base, self.calibration)
        if self.backend not in BACKENDS:
            raise ConfigError(f"there is no backend {self.backend!r} to build for; there are {', '.join(BACKENDS)}")
        rewrites.select(row.family.rewrites, self.without)
        check_architectures(self.architectures)
        engines = self.engines
        if self.backend == "tensorrt":
            engines = engines.validated()
            target_groups(engines.library, self.precision, self.architectures)
        sizes = tuple(dict.fromkeys(self.sizes or row.sizes))
        for width, height in sizes:
            _check_size(width, height, 1 if self.any_size and row.family.any_size else row.family.multiple)
        return msgspec.structs.replace(self, sizes=sizes, engines=engines, base=base)


def _check_size(width: int, height: int, multiple: int) -> None:
    if width % multiple or height % multiple or min(width, height) < SMALLEST:
        nearest = (max(SMALLEST, round(side / multiple) * multiple) for side in (width, height))
        raise ConfigError(
            f"a size of {width}x{height} cannot be built: both sides must be multiples of {multiple}, at least "
            f"{SMALLEST} (nearest: {'x'.join(map(str, nearest))})"
        )


def carried_weights(options: BuildOptions) -> Path | None:
    """The directory of the weights that come with the code, unless the user named others."""
    given = options.given
    return None if given.checkpoint or given.dit else preset(options.model).weights


def find_files(options: BuildOptions) -> tuple[Files, dict[str, str]]:
    """The model's files and where each came from. Raises CheckpointError; see `sources.resolve`."""
    directory = carried_weights(options)
    family = preset(options.model).family
    if directory is None:
        return sources.resolve(options.given, family)
    given = msgspec.structs.replace(options.given, checkpoint=str(directory), no_lora=options.given.lora is None)
    files, origins = sources.resolve(given, family)
    return files, {role: f"{options.model}: {Path(origin).name}" for role, origin in origins.items()}


def plan_build(options: BuildOptions, files: Files) -> tuple[Quantizer, Plan]:
    """What becomes 8-bit, and what the build does and needs. Raises QuantizationError and CheckpointError."""
    quantizer = Quantizer.load(options.precision, options.base, options.calibration)
    return quantizer, make_plan(
        files,
        list(options.sizes),
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
    console = console or Console(quiet=True)
    files, origins = find_files(options)
    applied = rewrites.select(files.family.rewrites, options.without)
    quantizer, plan = plan_build(options, files)
    with progress_bar(console) as progress:
        size = sum(path.stat().st_size for path in _paths(files))
        task = progress.add_task("reading inputs", total=size, unit="")
        inputs = sources.digests(files, origins, lambda done: progress.advance(task, done))
    quantizer.check(inputs, applied)
    key = build_key(options, inputs, quantizer.digest)
    if _is_current(options.output, key):
        console.print(
            f"{options.output} is up to date: same inputs, options and builder. Nothing to do.", soft_wrap=True
        )
        return options.output
    check_resources(plan, options.output)
    with staged(options.output) as staging, progress_bar(console) as progress:
        manifest = _build_into(staging, options, files, inputs, key, quantizer, progress)
        write_manifest(staging, manifest)
        publish(staging, options.output)
    report(manifest, options.output, console)
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
    progress: Progress,
) -> Manifest:
    family = files.family
    applied = rewrites.select(family.rewrites, options.without)
    groups = 0
    if options.backend == "tensorrt":
        groups = len(target_groups(options.engines.library, options.precision, options.architectures))
    each = 7 + len(STAGES) * groups + bool(quantizer.linears)
    total = 3 + each * len(options.sizes) + bool(options.architectures)
    steps = progress.add_task("loading", total=total)

    def step(what: str) -> None:
        progress.update(steps, description=what, advance=1)

    first = options.sizes[0]
    pipeline, source = open_streamed(files, *first, allow_unexpected=options.allow_unexpected)
    references: dict[str, checks.Outputs] = {}
    bounds: dict[str, dict[str, float]] = {}
    original_guidance = pipeline.denoiser.guidance
    mean = any(rewrite.name == "channel-mean" for rewrite in applied)
    pipeline.denoiser.guidance = None  # two identical prompts: the reference needs one
    for width, height in options.sizes:
        name = f"{width}x{height}"
        step(f"reference {name}")
        pipeline.denoiser.resize(width, height)
        references[name] = checks.reference_outputs(pipeline, checks.seeded_rgb(width, height), mean=mean)
        if options.precision in DTYPES:
            bounds[name] = checks.bounds(checks.cast_copy(pipeline, options.precision), references[name])
    pipeline.denoiser.guidance = original_guidance
    pipeline.denoiser.resize(*first)

    step("rewriting")
    form = rewritten_form(family, (pipeline.denoiser.config, pipeline.vae.config), pipeline.prompt, applied, first)
    final = copy.deepcopy(form.denoiser)
    quantizer.apply(final)
    cast_module(final, options.base)
    stored = staging / "denoiser.safetensors"
    write_rewritten(pipeline, source, final, applied, options.base, stored, quantizer)
    rewrites.apply(pipeline, [rewrite for rewrite in applied if rewrite.network == "vae"])
    pipeline.denoiser = form.denoiser
    if options.precision == "fp16":
        _check_fp16(pipeline, stored, references[f"{first[0]}x{first[1]}"])
    pipeline.denoiser = final
    cast_module(pipeline.vae, options.base)
    if quantizer.linears:
        emulated = streamed_copy(pipeline, stored)
        for width, height in options.sizes:
            step(f"emulating {width}x{height}")
            emulated.denoiser.resize(width, height)
            name = f"{width}x{height}"
            bounds[name] = checks.bounds(emulated, references[name])
    modules = pipeline.stages()
    for stage in ("encoder", "decoder"):
        write_weights(modules[stage], staging / f"{stage}.safetensors")
    step("weights")

    config = pipeline.vae.config
    decode = decoding(family, config)
    buckets: list[Bucket] = []
    measured: list[Check] = []
    for width, height in options.sizes:
        name = f"{width}x{height}"
        pipeline.denoiser.resize(width, height)
        latent = (config.z_channels, height // 8, width // 8)
        examples = {
            "encoder": ("rgb", "latent", torch.zeros(1, 3, height, width)),
            "denoiser": ("latent", "output", torch.zeros(1, *latent)),
            "decoder": ("latents", "decoded", torch.zeros(pipeline.decoder_batch, *latent)),
        }
        for stage, module in modules.items():
            step(f"{stage} {name}")
            taken, given, example = examples[stage]
            export_graph(
                module,
                example,
                (taken, given),
                staging / f"{stage}.safetensors",
                staging / f"{stage}_{name}.onnx",
                exact=options.base == "fp32",
            )
        bucket = Bucket(width, height, *(describe(staging / f"{stage}_{name}.onnx") for stage in STAGES))
        step(f"checking {name}")
        outputs = checks.graph_outputs(staging, bucket, decode, references[name], widen=options.base == "bf16")
        what = "PyTorch float32, rewrites off" + (" (graph widened to float32)" if options.base == "bf16" else "")
        measured += checks.check_bucket(bucket, outputs, references[name], bounds[name], what)
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
        weights_note=preset(options.model).weights_note if carried_weights(options) else "",
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
    )


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
    libraries = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "safetensors", "numpy")
    return {
        "densegeo": densegeo.__version__,
        "python": platform.python_version(),
        **{library: metadata.version(library) for library in libraries},
    }


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
            options.precision,
            options.base,
            calibration,
            options.backend,
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


def _is_current(output: Path, key: str) -> bool:
    try:
        manifest = read_manifest(output)
        check_files(output, manifest, digests=False)
    except BundleError:
        return False
    return manifest.build_key == key


def _older(output: Path) -> tuple[Path, Manifest] | None:
    """The bundle that will be replaced, whose engines may still be current."""
    try:
        return output, read_manifest(output)
    except BundleError:
        return None
