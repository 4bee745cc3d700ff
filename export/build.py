"""checkpoint -> float32 pipeline -> rewrites -> precision -> three ONNX graphs a bucket -> checks -> bundle."""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
from densegeo.export.staging import publish, staged
from densegeo.models import rewrites
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


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to build. sizes: (width, height) buckets, multiples of 16."""

    model: str
    output: Path
    given: sources.Given = sources.Given()
    sizes: tuple[tuple[int, int], ...] = ()  # empty: the model's default
    precision: str = "fp32"
    base: str = ""  # what fp8 and int8 leave in floating point; empty: bf16
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
        rewrites.select(self.without)
        check_architectures(self.architectures)
        engines = self.engines
        if self.backend == "tensorrt":
            engines = engines.validated()
            target_groups(engines.library, self.precision, self.architectures)
        sizes = tuple(dict.fromkeys(self.sizes or row.sizes))
        for width, height in sizes:
            if width % 16 or height % 16 or min(width, height) < 32:
                raise ConfigError(
                    f"a size of {width}x{height} cannot be built: both sides must be multiples of 16, at least 32 "
                    f"(nearest: {max(32, round(width / 16) * 16)}x{max(32, round(height / 16) * 16)})"
                )
        return msgspec.structs.replace(self, sizes=sizes, engines=engines, base=base)


def carried_weights(options: BuildOptions) -> Path | None:
    """The directory of the weights that come with the code, unless the user named others."""
    given = options.given
    return None if given.checkpoint or given.dit else preset(options.model).weights


def find_files(options: BuildOptions) -> tuple[Files, dict[str, str]]:
    """The model's files and where each came from. Raises CheckpointError; see `sources.resolve`."""
    directory = carried_weights(options)
    if directory is None:
        return sources.resolve(options.given)
    given = msgspec.structs.replace(options.given, checkpoint=str(directory), no_lora=options.given.lora is None)
    files, origins = sources.resolve(given)
    return files, {role: f"{options.model}: {Path(origin).name}" for role, origin in origins.items()}


def plan_build(options: BuildOptions, files: Files) -> tuple[Quantizer, Plan]:
    """What becomes 8-bit, and what the build does and needs. Raises QuantizationError and CheckpointError."""
    quantizer = Quantizer.load(options.precision, options.base, options.calibration)
    return quantizer, make_plan(
        files,
        list(options.sizes),
        options.base,
        rewrites.select(options.without),
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
    applied = rewrites.select(options.without)
    quantizer, plan = plan_build(options, files)
    with _progress(console) as progress:
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
    with staged(options.output) as staging, _progress(console) as progress:
        manifest = _build_into(staging, options, files, inputs, key, quantizer, progress)
        write_manifest(staging, manifest)
        publish(staging, options.output)
    _report(manifest, options.output, console)
    return options.output


def _paths(files: Files) -> list[Path]:
    return [path for path in (files.dit, files.vae, files.prompt, files.lora, files.config) if path]


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
    applied = rewrites.select(options.without)
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
    original_guidance = pipeline.transformer.guidance
    pipeline.transformer.guidance = None  # two identical prompts: the reference needs one
    for width, height in options.sizes:
        name = f"{width}x{height}"
        step(f"reference {name}")
        pipeline.transformer.resize(width, height)
        references[name] = checks.reference_outputs(pipeline, checks.seeded_rgb(width, height))
        if options.precision in DTYPES:
            bounds[name] = checks.bounds(checks.cast_copy(pipeline, options.precision), references[name])
    pipeline.transformer.guidance = original_guidance
    pipeline.transformer.resize(*first)

    step("rewriting")
    form = rewritten_form((pipeline.transformer.config, pipeline.vae.config), pipeline.prompt, applied, first)
    final = copy.deepcopy(form.transformer)
    quantizer.apply(final)
    cast_module(final, options.base)
    stored = staging / "transformer.safetensors"
    write_rewritten(pipeline, source, final, applied, options.base, stored, quantizer)
    rewrites.apply(pipeline, [rewrite for rewrite in applied if rewrite.network == "vae"])
    pipeline.transformer = form.transformer
    if options.precision == "fp16":
        _check_fp16(pipeline, stored, references[f"{first[0]}x{first[1]}"])
    pipeline.transformer = final
    cast_module(pipeline.vae, options.base)
    if quantizer.linears:
        emulated = streamed_copy(pipeline, stored)
        for width, height in options.sizes:
            step(f"emulating {width}x{height}")
            emulated.transformer.resize(width, height)
            name = f"{width}x{height}"
            bounds[name] = checks.bounds(emulated, references[name])
    modules = {
        "encoder": pipeline.vae.encoder,
        "transformer": pipeline.transformer,
        "decoder": pipeline.vae.decoder,
    }
    for stage in ("encoder", "decoder"):
        write_weights(modules[stage], staging / f"{stage}.safetensors")
    step("weights")

    config = pipeline.vae.config
    decode = Decode("log_affine", config.scale_factor, config.shift_factor, depth_sign=-1, normal_sign=1)
    buckets: list[Bucket] = []
    measured: list[Check] = []
    for width, height in options.sizes:
        name = f"{width}x{height}"
        pipeline.transformer.resize(width, height)
        latent = (config.z_channels, height // 8, width // 8)
        examples = {
            "encoder": ("rgb", "latent", torch.zeros(1, 3, height, width)),
            "transformer": ("latent", "velocity", torch.zeros(1, *latent)),
            "decoder": ("latents", "decoded", torch.zeros(pipeline.decoder_batch, *latent)),
        }
        for stage, module in modules.items():
            step(f"{stage} {name}")
            taken, given, example = examples[stage]
            export_graph(
                module, example, (taken, given), staging / f"{stage}.safetensors", staging / f"{stage}_{name}.onnx"
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
            msgspec.to_builtins(pipeline.transformer.config), msgspec.to_builtins(pipeline.vae.config), PROMPT_FILE
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


def _check_fp16(pipeline: Pipeline, stored: Path, wanted: checks.Outputs) -> None:
    """Refuse fp16 where the seeded input's magnitudes would overflow; `stored` are the transformer's fp16 weights."""
    streamed = streamed_copy(pipeline, stored)
    recorder = RangeRecorder()
    with recorder.watch(streamed.transformer, "transformer"), recorder.watch(streamed.vae, "vae"):
        checks.reference_outputs(streamed, wanted["rgb"])
    recorder.check_fp16()


def streamed_copy(pipeline: Pipeline, stored: Path) -> Pipeline:
    """The same networks, the transformer's stored tensors read when they are needed."""
    streamed = Pipeline(copy.deepcopy(pipeline.transformer), pipeline.vae, pipeline.prompt)
    streamed.decoder_batch = pipeline.decoder_batch
    source = BlockFile(stored)
    source.fill_outside(streamed.transformer)
    source.attach(streamed.transformer)
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


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def _report(manifest: Manifest, output: Path, console: Console) -> None:
    for check in manifest.verification.checks:
        console.print(
            f"  {check.bucket} {check.output:<12} error {check.error:.1e}  bound {check.bound:.1e}  "
            f"against {check.reference}",
            highlight=False,
            soft_wrap=True,
        )
    size = sum(file.bytes for file in manifest.files.values())
    console.print(f"built {output}: {manifest.model}, {manifest.precision}, {size / 1e6:.1f} MB", soft_wrap=True)
    if manifest.weights_note:
        console.print(f"[yellow]{manifest.weights_note}[/yellow]", soft_wrap=True)
    if manifest.base == "bf16":
        console.print(
            "[yellow]ONNX Runtime's CPU provider cannot run bf16: without a GPU, densegeo\\[openvino] or "
            "densegeo\\[torch] runs this bundle.[/yellow]",
            soft_wrap=True,
        )
