"""checkpoint -> float32 pipeline -> rewrites -> precision -> three ONNX graphs a bucket -> checks -> bundle."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console

from densegeo.errors import BundleError, CheckpointError
from densegeo.export import checks, digests, downloads, forms, sources
from densegeo.export.build_options import BuildOptions
from densegeo.export.build_plan import Plan, check_resources, make_plan
from densegeo.export.build_state import Graphs, State, Weights
from densegeo.export.command_line import flags
from densegeo.export.display import Display
from densegeo.export.engine_plan import device_plan
from densegeo.export.graphs import make_graphs
from densegeo.export.keys import onnxruntime_version, stage_keys, versions
from densegeo.export.quantizer import Quantizer
from densegeo.export.references import make_references
from densegeo.export.reporting import recommend, report
from densegeo.export.stages import PROMPT_FILE, Job, make_engines, make_kernels, run_stage
from densegeo.export.staging import finish_publishing, folder_bytes, locked, publish, remove_published
from densegeo.export.weights import make_weights
from densegeo.kernels.contract import LaunchContract
from densegeo.models import rewrites
from densegeo.models.loading import Files
from densegeo.models.presets import preset
from densegeo.models.published import PUBLICATIONS
from densegeo.models.weight_file import parts
from densegeo.runtime.bundle import (
    SCHEMA_VERSION,
    Engine,
    Manifest,
    Networks,
    Source,
    Verification,
    check_files,
    read_manifest,
    write_manifest,
)


def find_files(options: BuildOptions, console: Console, scratch: Path | None = None) -> tuple[Files, dict[str, str]]:
    """The model's files and where each came from; those that nobody named are fetched from where they are published.

    scratch: a folder that is thrown away, for what must be made of the files without leaving anything. Raises
    CheckpointError; see `sources.resolve`.
    """
    directory, row = options.carried_weights, preset(options.model)
    family = row.family
    if directory is None:
        return sources.resolve(options.source, family, _published(options, console), scratch)
    without = {role.skip: getattr(options.source, role.name) is None for role in family.roles if role.skip}
    source = msgspec.structs.replace(options.source, checkpoint=str(directory), **without)
    files, origins = sources.resolve(source, family)
    return files, {role: f"{options.model}: {Path(origin).name}" for role, origin in origins.items()}


def _published(options: BuildOptions, console: Console) -> dict[str, tuple[Path, str]]:
    """The files that the user did not name, role -> (file, origin). Raises CheckpointError."""
    row = PUBLICATIONS[options.model]
    roles = sources.unnamed(options.source, preset(options.model).family)
    if not roles:
        return {}
    if not row.files:
        raise CheckpointError(row.nowhere)
    downloadable = downloads.look(row, roles, offline=options.source.offline)
    downloads.show(downloadable, console)
    return downloads.fetch(row, downloadable, console, any_digest=options.source.any_digest)


def plan_build(options: BuildOptions, files: Files) -> tuple[Quantizer, Plan]:
    """What becomes 8-bit, and what the build does and needs. Raises QuantizationError and CheckpointError."""
    quantizer = Quantizer.load(options.precision, options.base, options.calibration)
    quantizer.require_backend(options.backend)
    return quantizer, make_plan(
        files,
        options.sizes,
        max((1, *options.batches)),
        options.base,
        rewrites.select(files.family.rewrites, options.without),
        quantizer.saved,
        allow_unexpected=options.allow_unexpected,
    )


def build_bundle(options: BuildOptions, console: Console | None = None) -> Path:
    """Build a bundle and return its directory. An interrupted build goes on from its last finished stage.

    Nothing is left behind when the build fails, except what other options for kernels and engines can go on from; see
    `State.resumable`. Raises ConfigError, CheckpointError, ResourceError, ExportError, KernelError and EngineError.
    """
    options = options.validated()
    onnxruntime_version()  # without it the graphs cannot be checked, which would be found out late
    console = console or Console(quiet=True)
    files, origins = find_files(options, console)
    applied = rewrites.select(files.family.rewrites, options.without)
    quantizer, plan = plan_build(options, files)
    inputs = _identify(files, origins, console)
    quantizer.check(inputs, applied)
    with Display(console) as display:
        options = msgspec.structs.replace(options, form=forms.choose(options, plan.template.vae.config, display))
    keys = stage_keys(options, inputs, quantizer.digest)
    finish_publishing(options.output)
    if (current := _current(options.output, keys.bundle)) is not None:
        remove_published(options.output)
        console.print(
            f"{options.output} is up to date: same inputs, options and builder. Nothing to do.", soft_wrap=True
        )
        recommend(current, console)
        return options.output
    with locked(options.output) as staging, Display(console) as display:
        with display.bar("looking at what is finished", folder_bytes(staging)) as bar:
            state = State(staging, keys, bar.advance)
        check_resources(plan, options.output, sum(file.bytes for file in state.files.values()))
        with state.resumable(display.say):
            manifest = _build_into(state, Job(options, files, quantizer, plan, display), inputs)
            write_manifest(state.bundle, manifest)
            publish(staging, options.output)
        state.forget()
    needed = (device_plan(plan, size, options.base, max((1, *options.batches))) for size in options.sizes)
    report(manifest, options.output, max(needed, key=lambda estimate: estimate.total), console)
    return options.output


def _identify(files: Files, origins: dict[str, str], console: Console) -> list[Source]:
    """Size and digest of every input file; only those are read that are not known yet."""
    size = sum(part.stat().st_size for path in files.paths.values() for part in parts(path))
    with Display(console) as display, display.bar("reading inputs", size) as bar:
        return digests.inputs(files, origins, bar.advance)


def _build_into(state: State, job: Job, inputs: list[Source]) -> Manifest:
    """Run the stages that are not finished; returns the manifest."""
    options = job.options
    run_stage(job, state, state.references, make_references)
    weights = run_stage(job, state, state.weights, make_weights)
    graphs = run_stage(job, state, state.graphs, make_graphs)
    contracts = run_stage(job, state, state.kernels, make_kernels).contracts if options.architectures else []
    engines = make_engines(job, state, _older(options.output)).engines if options.with_engines else []
    state.prune()  # the files of the records, and no other
    return make_manifest(job, state, inputs, weights, graphs, contracts, engines)


def make_manifest(
    job: Job,
    state: State,
    inputs: list[Source],
    weights: Weights,
    graphs: Graphs,
    contracts: list[LaunchContract],
    engines: list[Engine],
) -> Manifest:
    """What the stages' records say together."""
    options, template = job.options, job.plan.template
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=options.model,
        precision=options.precision,
        base=options.base,
        quantization=job.quantizer.record,
        weights_note=preset(options.model).weights_note if options.carried_weights else "",
        buckets=graphs.buckets,
        decode=job.decode,
        networks=Networks(
            job.files.family.name,
            msgspec.to_builtins(template.denoiser.config),
            msgspec.to_builtins(template.vae.config),
            PROMPT_FILE,
        ),
        rewrites=[rewrite.name for rewrite in job.applied],
        files=state.files,
        sources=inputs,
        build_key=state.keys.bundle,
        versions=versions(),
        target_architectures=[f"sm_{number}" for number in options.architectures],
        kernels=contracts,
        engines=engines,
        verification=Verification(
            checks.INPUTS_FILE,
            checks.served_bounds(weights.bounds.values()),
            max(by_output["replay"] for by_output in weights.bounds.values()),
            graphs.checks,
        ),
        options=flags(options),
        choice=options.choice,
    )


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
