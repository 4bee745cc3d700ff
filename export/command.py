"""The build command: `densegeo build` and `python export/build_engine.py` are this function."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from densegeo.errors import CheckpointError, ConfigError
from densegeo.export.build import BACKENDS, BuildOptions, build_bundle, find_files, plan_build
from densegeo.export.engine_plan import CARDS, builder_line, card_verdict, device_plan
from densegeo.export.engines import EngineOptions
from densegeo.export.plan import (
    GIB,
    Plan,
    available_memory,
    check_resources,
    latent_tokens,
    transformer_flops,
)
from densegeo.export.sources import Given
from densegeo.models.precision import BASES, EIGHT_BIT_BASES
from densegeo.models.presets import PRESETS
from densegeo.models.rewrites import NAMES, REWRITES, select

# `Optional` and not `| None`: typer evaluates these at run time, also on Python 3.10.
Text = Optional[str]  # noqa: UP045
_ENGINES = "TensorRT engines (--backend tensorrt)"
_FILE = "a file, or organisation/repository@revision:file on the Hugging Face Hub"


def parse_size(text: str) -> tuple[int, int]:
    """ "1024x768" -> (1024, 768); raises ConfigError."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise ConfigError(f"--size {text!r} is not WIDTHxHEIGHT, such as 1024x768")
    return int(match[1]), int(match[2])


def build(
    model: Annotated[str, typer.Option(help=f"What to build: {', '.join(PRESETS)}.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The bundle's directory; out/MODEL by default.")
    ] = None,
    checkpoint: Annotated[
        Text, typer.Option(help="Directory with the authors' file names, or a Hugging Face repository id.")
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
    precision: Annotated[str, typer.Option(help=f"{', '.join(BASES)}.")] = "fp32",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The directory that `densegeo calibrate` made, for fp8 and int8."),
    ] = None,
    base: Annotated[
        str, typer.Option(help=f"What fp8 and int8 leave in floating point: {' (default) or '.join(EIGHT_BIT_BASES)}.")
    ] = "",
    backend: Annotated[str, typer.Option(help=f"What runs the graphs: {', '.join(BACKENDS)}.")] = "onnxruntime",
    no_rewrite: Annotated[
        Optional[list[str]], typer.Option("--no-rewrite", help=f"Leave one out (repeatable): {', '.join(NAMES)}.")  # noqa: UP045
    ] = None,
    gpu_arch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--gpu-arch", help="Build GPU kernels and engines for this architecture: 89 is sm_89 (repeatable)."
        ),
    ] = None,
    builder: Annotated[
        str, typer.Option(help="TensorRT library: auto, tensorrt or tensorrt_rtx.", rich_help_panel=_ENGINES)
    ] = "auto",
    weights: Annotated[
        str,
        typer.Option(
            help="constant (in the engine), input (bound from the weight file), or auto: constant if the build fits.",
            rich_help_panel=_ENGINES,
        ),
    ] = "auto",
    workspace_mib: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Limit of an engine's workspace on the GPU, in MiB.", rich_help_panel=_ENGINES),
    ] = None,
    optimization_level: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The builder's effort, 0 to 5.", rich_help_panel=_ENGINES),
    ] = None,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming", help="Let weights stay in host memory at run time.", rich_help_panel=_ENGINES
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Engines that later TensorRT versions load too.", rich_help_panel=_ENGINES
        ),
    ] = False,
    engine_timeout: Annotated[
        int, typer.Option(min=1, help="Seconds one engine may take.", rich_help_panel=_ENGINES)
    ] = 7200,
    memory_gib: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Memory the builder may take; default: 90 % of what is free.", rich_help_panel=_ENGINES),
    ] = None,
    no_lora: Annotated[bool, typer.Option("--no-lora", help="Build without the FE2E LoRA.")] = False,
    allow_unexpected: Annotated[
        bool, typer.Option("--allow-unexpected", help="Ignore tensors the model does not know.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Build a bundle: checkpoint files in, a directory that `Estimator` runs out."""
    options = BuildOptions(
        model=model,
        output=output or Path("out") / model,
        given=Given(checkpoint=checkpoint, dit=dit, vae=vae, lora=lora, prompt=prompt, config=config, no_lora=no_lora),
        sizes=tuple(parse_size(text) for text in size or ()),
        precision=precision,
        base=base,
        calibration=calibration,
        backend=backend,
        without=tuple(no_rewrite or ()),
        allow_unexpected=allow_unexpected,
        architectures=tuple(dict.fromkeys(gpu_arch or ())),
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
    console = Console()
    if dry_run:
        dry_run_report(options, console)
    else:
        build_bundle(options, console)


def dry_run_report(options: BuildOptions, console: Console) -> None:
    """Print what the files hold and what a build would do; raises what would stop the build."""
    files, origins = find_files(options)
    _, plan = plan_build(options, files)
    _print_files(plan, origins, console)
    _print_plan(plan, options, console)
    if plan.problems:
        hint = ""
        if any(report.unexpected for report in plan.reports) and not options.allow_unexpected:
            hint = "\nIf the unexpected tensors are known to be harmless, pass --allow-unexpected."
        raise CheckpointError("the files do not fit:\n  " + "\n  ".join(plan.problems) + hint)
    check_resources(plan, options.output)
    console.print("The build can start.")


def _print_files(plan: Plan, origins: dict[str, str], console: Console) -> None:
    table = Table("file", "keys found", "missing", "unexpected", "wrong shape", "dtypes", "bytes", title="inputs")
    for role, report in zip(("dit", "vae"), plan.reports, strict=True):
        dtypes: dict[str, int] = {}
        for entry in plan.skeleton.entries[role].values():
            dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + 1
        table.add_row(
            origins[role],
            *(str(n) for n in (report.found, len(report.missing), len(report.unexpected), len(report.misshapen))),
            ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items())),
            f"{report.path.stat().st_size:,}",
        )
    console.print(table)
    prompt, (rows, counts) = plan.prompt, plan.prompt.merge_padding()
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
    config, vae = plan.skeleton.configs
    console.print(
        f"transformer: hidden {config.hidden_size}, {config.num_heads} heads of {config.head_size}, "
        f"{config.depth} double + {config.depth_single_blocks} single blocks, RoPE axes {config.axes_dim}, "
        f"connector {config.prompt_dim} -> {config.connector_hidden} with {config.connector_heads} heads; "
        f"VAE widths {[vae.ch * mult for mult in vae.ch_mult]}",
        soft_wrap=True,
    )
    on = {rewrite.name for rewrite in select(options.without)}
    console.print(
        "rewrites: " + ", ".join(f"{r.name}" if r.name in on else f"({r.name} off)" for r in REWRITES), soft_wrap=True
    )
    table = Table("size", "tokens (text + image)", "transformer GFLOP", title=f"{options.model}, {options.precision}")
    for (width, height), tokens in zip(options.sizes, latent_tokens(list(options.sizes)), strict=True):
        flops = transformer_flops(config, plan.text_tokens, tokens) * (1 if "guidance" in on else 2)
        table.add_row(f"{width}x{height}", f"{plan.text_tokens} + {tokens}", f"{flops / 1e9:,.1f}")
    console.print(table)
    if options.backend == "tensorrt":
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
    for width, height in options.sizes:
        needed = device_plan(plan, (width, height), options.base)
        amounts = (f"{count / GIB:.2f} GiB" for count in (needed.weights, needed.workspace))
        table.add_row(f"{width}x{height}", *amounts, *(card_verdict(needed, card) for card in CARDS))
    console.print(table)
