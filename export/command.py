"""The build command: `densegeo build` and `python export/build_engine.py` are this function."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from densegeo.backends import NAMES
from densegeo.errors import CheckpointError, ConfigError
from densegeo.export.build import build_bundle, find_files, plan_build
from densegeo.export.build_options import BuildOptions
from densegeo.export.build_plan import Plan, check_resources, stage_flops
from densegeo.export.choice import AUTO, BuildRequest, choose, on_this_gpu
from densegeo.export.downloads import look, show
from densegeo.export.engine_builder import EngineOptions
from densegeo.export.engine_flags import (
    Builder,
    EngineTimeout,
    MemoryGib,
    OptimizationLevel,
    VersionCompatible,
    Weights,
    WeightStreaming,
    WorkspaceMib,
)
from densegeo.export.engine_plan import CARDS, builder_line, card_verdict, device_plan
from densegeo.export.machine import GIB, available_memory, this_machine
from densegeo.export.quantizer import plans_convolutions
from densegeo.export.sources import SourceOptions, to_fetch, unnamed
from densegeo.export.staging import check_output
from densegeo.export.trial import try_out
from densegeo.models.families import FAMILIES
from densegeo.models.presets import PRESETS, preset
from densegeo.models.published import PUBLICATIONS
from densegeo.models.rewrites import select
from densegeo.models.weight_file import parts
from densegeo.precision import CALIBRATED, PRECISIONS, QUANTIZED
from densegeo.runtime.bundle import STAGES
from densegeo.size import Size

# `Optional` and not `| None`: typer evaluates these at run time, also on Python 3.10.
Text = Optional[str]  # noqa: UP045
_REWRITES = "; ".join(f"{name}: {', '.join(row.rewrite_names)}" for name, row in FAMILIES.items())
_BASES = " or ".join(dict.fromkeys(" (default) or ".join(PRECISIONS[name].bases) for name in QUANTIZED))
_FILE = "a file, or organisation/repository@revision:file on the Hugging Face Hub"


def bucket_sizes(edge: int, aspects: list[str], multiple: int) -> list[Size]:
    """Sizes whose longer side is `edge`, one for each "4:3"; sides nearest to it that are multiples of `multiple`.

    With multiple 1 they are cut to whole pixels, as FiffDepth's authors do. Raises ConfigError.
    """
    sizes = []
    for text in aspects:
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
        if not match:
            raise ConfigError(f"--aspect {text!r} is not WIDTH:HEIGHT, such as 4:3")
        aspect = int(match[1]), int(match[2])
        exact = [edge * side / max(aspect) for side in aspect]
        sides = [int(side) if multiple == 1 else max(1, round(side / multiple)) * multiple for side in exact]
        sizes.append(Size(*sides))
    return sizes


def build(
    model: Annotated[str, typer.Option(help=f"What to build: {', '.join(PRESETS)}.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The bundle's directory; out/MODEL by default.")
    ] = None,
    checkpoint: Annotated[
        Text,
        typer.Option(help="Directory with the authors' file names, or organisation/repository[@revision][:folder]."),
    ] = None,
    variant: Annotated[
        Text, typer.Option(help="Of the weights in --checkpoint: fp16 takes NAME.fp16.safetensors.")
    ] = None,
    dit: Annotated[Text, typer.Option(help=f"Step1X-Edit transformer: {_FILE}.")] = None,
    vae: Annotated[Text, typer.Option(help=f"Flux autoencoder: {_FILE}.")] = None,
    lora: Annotated[Text, typer.Option(help=f"FE2E LoRA: {_FILE}.")] = None,
    prompt: Annotated[Text, typer.Option(help="Cached prompt embedding (.npz or .safetensors).")] = None,
    config: Annotated[
        Text, typer.Option(help="JSON with what the tensors do not tell (axes_dim, connector_heads).")
    ] = None,
    size: Annotated[
        Optional[list[str]], typer.Option("--size", help="WIDTHxHEIGHT, multiples of 16; repeat for more buckets.")  # noqa: UP045
    ] = None,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--batch", help="Graphs and engines that take this many images at once too, for throughput (repeatable)."
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help=f"{', '.join((AUTO, *PRECISIONS))}; auto: what the backend here runs fastest.")
    ] = AUTO,
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help=f"The directory that `densegeo calibrate` made, for {' and '.join(CALIBRATED)}."),
    ] = None,
    base: Annotated[str, typer.Option(help=f"What {' and '.join(QUANTIZED)} leave in floating point: {_BASES}.")] = "",
    backend: Annotated[
        str,
        typer.Option(
            help=f"What will run the bundle: {', '.join((AUTO, *NAMES))}. auto: TensorRT engines where a GPU and "
            "TensorRT are, else what is fastest on this machine."
        ),
    ] = AUTO,
    no_rewrite: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--no-rewrite", help=f"Leave one out (repeatable): {_REWRITES}."),
    ] = None,
    gpu_arch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--gpu-arch", help="Build GPU kernels and engines for this architecture: 89 is sm_89 (repeatable)."
        ),
    ] = None,
    builder: Builder = AUTO,
    weights: Weights = AUTO,
    workspace_mib: WorkspaceMib = None,
    optimization_level: OptimizationLevel = None,
    weight_streaming: WeightStreaming = False,
    version_compatible: VersionCompatible = False,
    engine_timeout: EngineTimeout = 7200,
    memory_gib: MemoryGib = None,
    max_edge: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=32, help="Instead of --size: the longer side in pixels; FiffDepth's authors take 768."),
    ] = None,
    aspect: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--aspect", help="With --max-edge: WIDTH:HEIGHT of a size (repeatable). Default: 4:3."),
    ] = None,
    authors_sizes: Annotated[
        bool,
        typer.Option(
            "--authors-sizes",
            help="FiffDepth: sides as given or cut to whole pixels, not rounded to multiples of 8. The picture is then "
            "decoded at the next smaller multiples and stretched, as the authors' code does.",
        ),
    ] = False,
    convert_bin: Annotated[
        bool, typer.Option("--convert-bin", help="Read pickled weights (weights_only) where there are no safetensors.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing: use published files that were fetched before.")
    ] = False,
    any_digest: Annotated[
        bool, typer.Option("--any-digest", help="Take published files whose digest is not the recorded one.")
    ] = False,
    no_lora: Annotated[bool, typer.Option("--no-lora", help="Build without the FE2E LoRA.")] = False,
    allow_unexpected: Annotated[
        bool, typer.Option("--allow-unexpected", help="Ignore tensors the model does not know.")
    ] = False,
    tune: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--tune/--no-tune",
            help="Race the ways in which graphs can write upsampling and norms on this CPU, and take the fastest; "
            "later builds take it too. --no-tune: the backend's own.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Build a bundle: checkpoint files in, a directory that `Estimator` runs out."""
    row = preset(model)
    family = row.family
    if authors_sizes and not family.any_size:
        raise ConfigError(f"--authors-sizes is not for {model}, whose sides are multiples of {family.multiple}")
    if (max_edge is not None and size) or (aspect and max_edge is None):
        raise ConfigError("give --size, or --max-edge with --aspect")
    sizes = [Size.parse(text) for text in size or ()]
    if max_edge is not None:
        sizes = bucket_sizes(max_edge, aspect or ["4:3"], 1 if authors_sizes else family.multiple)
    console, machine = Console(), this_machine()
    choice = choose(
        BuildRequest(
            backend=backend,
            precision=precision,
            base=base,
            architectures=tuple(dict.fromkeys(gpu_arch or ())),
            calibration=calibration,
            convolutions=plans_convolutions(calibration),
            weight_streaming=weight_streaming,
        ),
        machine,
        row,
    )
    options = BuildOptions(
        model=model,
        output=output or Path("out") / model,
        source=SourceOptions(
            checkpoint=checkpoint,
            variant=variant,
            dit=dit,
            vae=vae,
            lora=lora,
            prompt=prompt,
            config=config,
            no_lora=no_lora,
            any_digest=any_digest,
            offline=offline,
            convert_bin=convert_bin,
        ),
        sizes=tuple(sizes),
        batches=tuple(batch or ()),
        any_size=authors_sizes,
        precision=choice.precision,
        base=base,
        calibration=calibration,
        backend=choice.backend,
        without=tuple(no_rewrite or ()),
        allow_unexpected=allow_unexpected,
        architectures=tuple(choice.architectures),
        choice=choice,
        tune=tune,
        engines=EngineOptions(
            library=builder,
            weights=weights,  # type: ignore[arg-type]  # checked by validated()
            workspace_mib=workspace_mib,
            optimization_level=optimization_level,
            weight_streaming=weight_streaming,
            version_compatible=version_compatible,
            timeout_s=engine_timeout,
            memory_gib=memory_gib,
        ),
    ).validated()
    for line in (f"{model}: {choice.what}", choice.why, f"for another choice: {choice.instead}"):
        console.print(line, soft_wrap=True)
    if dry_run:
        dry_run_report(options, console)
    else:
        bundle = build_bundle(options, console)
        if on_this_gpu(choice, machine):
            try_out(bundle, choice.backend, console)


def dry_run_report(options: BuildOptions, console: Console) -> None:
    """Print what the files hold and what a build would do; raises what would stop the build. Leaves nothing behind."""
    if _not_here(options, console) or _not_fetched(options, console):
        return
    with TemporaryDirectory(prefix="densegeo-dry-run-") as scratch:
        _report_plan(options, Path(scratch), console)


def _report_plan(options: BuildOptions, scratch: Path, console: Console) -> None:
    files, origins = find_files(options, console, scratch)
    _, plan = plan_build(options, files)
    _print_files(plan, options.model, origins, console)
    _print_plan(plan, options, console)
    if plan.problems:
        hint = ""
        if any(report.unexpected for report in plan.reports) and not options.allow_unexpected:
            hint = "\nIf the unexpected tensors are known to be harmless, pass --allow-unexpected."
        raise CheckpointError("the files do not fit:\n  " + "\n  ".join(plan.problems) + hint)
    check_resources(plan, options.output)
    check_output(options.output)
    console.print("The build can start.")


def _not_here(options: BuildOptions, console: Console) -> bool:
    """Whether published files would have to be fetched first; says which."""
    row, published = preset(options.model), PUBLICATIONS[options.model]
    roles = unnamed(options.source, row.family) if options.carried_weights is None else []
    downloads = look(published, roles, offline=options.source.offline)
    if all(download.local for download in downloads):
        return False
    show(downloads, console)
    bundle = PRECISIONS[options.base].bytes_of(row.bundle_parameters)
    console.print(
        f"disk: about {bundle / GIB:.1f} GiB more for the bundle; the plan's other figures need the files' headers: "
        f"`densegeo fetch {options.model}` fetches them. A dry run fetches nothing.",
        soft_wrap=True,
    )
    return True


def _not_fetched(options: BuildOptions, console: Console) -> bool:
    """Whether files of repositories that the user named would have to be fetched first; says which."""
    if options.carried_weights is not None:
        return False
    missing = to_fetch(options.source, preset(options.model).family)
    if not missing:
        return False
    table = Table("file", "size", title="to download", title_justify="left")
    for origin, size in missing:
        table.add_row(origin, f"{size:,} bytes" if size else "unknown")
    console.print(table)
    console.print(
        "The plan needs the files' headers, and a dry run fetches nothing: leave --dry-run out.",
        soft_wrap=True,
    )
    return True


def _print_files(plan: Plan, model: str, origins: dict[str, str], console: Console) -> None:
    table = Table("file", "keys found", "missing", "unexpected", "wrong shape", "dtypes", "bytes", title="inputs")
    roles = preset(model).family.weights
    for role, report, entries in zip(roles, plan.reports, plan.skeleton.entries, strict=True):
        dtypes: dict[str, int] = {}
        for entry in entries.values():
            dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + 1
        table.add_row(
            origins[role],
            *(str(n) for n in (report.matched, len(report.missing), len(report.unexpected), len(report.misshapen))),
            ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items())),
            f"{sum(part.stat().st_size for part in parts(report.path)):,}",
        )
    console.print(table)
    if not any(role.merged_into for role in preset(model).family.roles):
        return
    prompt = plan.skeleton.prompt
    rows, counts = prompt.merge_padding()
    groups = [int(count) for row, count in zip(rows, counts, strict=True) if not prompt.mask[row]]
    console.print(
        f"prompt: {len(prompt.mask)} tokens of {prompt.embeds.shape[1]} features, {prompt.valid} valid, "
        f"{len(groups)} padding groups {groups if len(groups) <= 8 else ''}",
        soft_wrap=True,
    )
    if plan.lora_ranks:
        ranks = sorted(set(plan.lora_ranks.values()))
        console.print(f"LoRA: {len(plan.lora_ranks)} modules, ranks {ranks}")
    else:
        console.print("LoRA: none")


def _print_plan(plan: Plan, options: BuildOptions, console: Console) -> None:
    vae, every = plan.template.vae.config, preset(options.model).family.rewrites
    console.print(plan.template.denoiser.summary(), soft_wrap=True)
    console.print(f"autoencoder: channels {', '.join(str(vae.ch * mult) for mult in vae.ch_mult)}", soft_wrap=True)
    on = {rewrite.name for rewrite in select(every, options.without)}
    console.print(
        "rewrites: " + ", ".join(f"{r.name}" if r.name in on else f"({r.name} off)" for r in every), soft_wrap=True
    )
    table = Table("size", *(f"{stage} GFLOP" for stage in STAGES), title=f"{options.model}, {options.precision}")
    for size in options.sizes:
        flops = stage_flops(plan.template, size)
        table.add_row(str(size), *(f"{flops[stage] / 1e9:,.1f}" for stage in STAGES))
    console.print(table)
    if options.with_engines:
        _print_engines(plan, options, console)
    memory = available_memory()
    console.print(
        f"parameters: {plan.loaded_parameters:,} read, about {plan.bundle_parameters:,} in the bundle\n"
        f"memory: about {plan.memory_needed / GIB:.1f} GiB needed"
        + (f", {memory / GIB:.1f} GiB available" if memory is not None else "")
        + f"; disk: about {plan.disk_needed / GIB:.2f} GiB needed; output: {options.output}",
        soft_wrap=True,
    )


def _print_engines(plan: Plan, options: BuildOptions, console: Console) -> None:
    """What the builder needs here, and what each size needs on cards of common sizes. Raises ResourceError."""
    console.print(builder_line(plan, options.engines), soft_wrap=True)
    table = Table("size", "weights", "workspace", *(f"{card} GiB card" for card in CARDS), title="on the GPU")
    for size in options.sizes:
        for batch in (1, *options.batches):
            needed = device_plan(plan, size, options.base, batch)
            amounts = (f"{count / GIB:.2f} GiB" for count in (needed.weights, needed.workspace))
            table.add_row(
                f"{size}" + (f", {batch} images" if batch > 1 else ""),
                *amounts,
                *(card_verdict(needed, card) for card in CARDS),
            )
    console.print(table)
