"""`densegeo calibrate`: a bundle and images -> statistics, and a plan of what becomes fp8 or int8."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import msgspec
import typer
from rich.console import Console
from rich.progress import track
from torch import nn

from densegeo.arguments import find_bundle, known_device
from densegeo.backends import BACKENDS, NETWORKS
from densegeo.calibration.collect import Images, collect, rgb_of
from densegeo.calibration.histogram import METHODS
from densegeo.calibration.layer_inputs import PARTS, LayerInputs, OnnxInputs, TorchInputs
from densegeo.calibration.picture import draw
from densegeo.calibration.plan import (
    Budget,
    Error,
    Judge,
    QuantizationPlan,
    Sensitivity,
    in_two_products,
    input_ranges,
    nothing_planned,
    plan_file,
    within_budget,
)
from densegeo.calibration.report import print_plan
from densegeo.calibration.resume import SensitivityFile
from densegeo.calibration.statistics import FILE, Statistics
from densegeo.calibration.work import multiply_adds
from densegeo.errors import ConfigError, ImageError, QuantizationError
from densegeo.files import atomic_write
from densegeo.inputs import find_images
from densegeo.models.layers import Attention
from densegeo.models.quantized import AttentionPlan, convolution_fits
from densegeo.models.rewrites import Pipeline
from densegeo.precision import CALIBRATED, FLOATS, PRECISIONS
from densegeo.runtime.backends.torch_modules import choose_device, load_networks
from densegeo.runtime.bundle import Manifest, check_files, read_manifest
from densegeo.runtime.ready import beside

_SEEN = " or ".join(row.name for row in BACKENDS if row.shows_layers)
JUDGED = 4  # images on which each layer's error alone is measured
JUDGED_TOGETHER = 16  # and the planned ones' together, of which four views of fe2e-tiny told half (benchmarks/LOG.md)
# SmoothQuant's exponent of convolutions in evenly spaced numbers, whose channels differ more than linears' do
EVEN = 0.5
_ATTENTION = " and ".join(row.name for row in PRECISIONS.values() if row.attention)
_FAST_CONVOLUTIONS = " and ".join(row.name for row in PRECISIONS.values() if row.fast_convolutions)
_EVENLY_SPACED = " and ".join(row.name for row in PRECISIONS.values() if row.calibrated and row.integer)


def calibrate(
    bundle: Annotated[
        Path,
        typer.Argument(
            parser=find_bundle,
            metavar="BUNDLE",
            help=f"A bundle in one of {', '.join(FLOATS)}: its directory, or fe2e-tiny, which comes with densegeo.",
            show_default=False,
        ),
    ],
    images: Annotated[list[str], typer.Option(help="Image, folder or glob; repeat for more.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where statistics and plan go; BUNDLE.calibration by default."),
    ] = None,
    kind: Annotated[str, typer.Option("--format", help=f"{', '.join(CALIBRATED)}.")] = CALIBRATED[0],
    method: Annotated[str, typer.Option(help=f"How ranges are chosen: {', '.join(METHODS)}.")] = "mse",
    smooth: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0.0,
            max=1.0,
            help="SmoothQuant's exponent, which evens out the channels of what enters a layer; 0 for none. Default: "
            f"{EVEN} with --convolutions of {_EVENLY_SPACED}, else 0.",
        ),
    ] = None,
    max_depth_error: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Root mean square of the depth prediction's change; 0.01 is 1 % of the log-depth range."),
    ] = None,
    max_normal_error: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Mean change of the normals in degrees."),
    ] = None,
    attention: Annotated[
        bool,
        typer.Option("--attention", help=f"Plan the two products of each attention too ({_ATTENTION})."),
    ] = False,
    convolutions: Annotated[
        bool,
        typer.Option(
            "--convolutions",
            help="Plan the convolutions of all networks too, autoencoder first. Those known to be faster than floating "
            f"point's somewhere: {_FAST_CONVOLUTIONS}.",
        ),
    ] = False,
    twice: Annotated[
        bool,
        typer.Option(
            "--twice",
            help="Convolutions that do not fit into the budget become two 8-bit products, of the rounded input and of "
            "what rounding left, instead of staying in floating point: nearly exact, for twice the work "
            f"({_EVENLY_SPACED}).",
        ),
    ] = False,
    weight_bits: Annotated[
        int,
        typer.Option(
            min=7,
            max=8,
            help="Of int8 weights; with 7 their products fit into the 16-bit sums of x86 processors without VNNI, on "
            "which OpenVINO would otherwise run them in float32.",
        ),
    ] = 8,
    everything: Annotated[
        bool, typer.Option("--everything", help="Plan first, last and thin layers too, for comparison.")
    ] = False,
    backend: Annotated[
        str, typer.Option(help=f"What runs the bundle: {_SEEN}. By default the first of these that can.")
    ] = "",
    base: Annotated[
        str, typer.Option(help="What the build will leave the rest in, as its --base; its own error counts too.")
    ] = "",
    device: Annotated[str, typer.Option(callback=known_device, help="With torch: auto, cpu, cuda or cuda:N.")] = "auto",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read blocks from disk as they run and measure no errors: for models larger than memory. Needs "
            f"--backend {NETWORKS.name} --device cpu.",
        ),
    ] = False,
) -> None:
    """Find out which layers can be 8-bit: statistics over images, errors of each alone, and a plan.

    Without a budget every linear of the blocks is planned, with --attention every attention, and with --convolutions
    every convolution but the first and last ones, shortcuts and thin ones. Run it again to go on after an interruption,
    or to make another format's plan from the same statistics.
    """
    _require_plannable(kind, method, base, attention=attention, weight_bits=weight_bits)
    budget = Budget(max_depth_error, max_normal_error)
    if twice:
        _require_two_products(kind, budget, convolutions=convolutions)
    smoothing_exponent = smooth if smooth is not None else EVEN * (convolutions and PRECISIONS[kind].integer)
    manifest = read_manifest(bundle)
    if manifest.quantization is not None:
        raise ConfigError(f"{bundle} is {manifest.precision} already: calibrate one of {', '.join(FLOATS)}")
    backend = _choose(backend, manifest, device, budget, stream=stream)
    check_files(bundle, manifest, digests=True)
    folder = output or beside(bundle, "calibration")
    console = Console()
    try:
        calibration_images = Images(find_images(images))
    except (ImageError, QuantizationError) as error:
        raise typer.BadParameter(str(error), param_hint="--images") from error
    first_bucket = manifest.buckets[0]
    torch_device = choose_device(device) if backend == NETWORKS.name else "cpu"
    pipeline = load_networks(bundle, manifest, first_bucket.size, torch_device, streamed=stream)
    for network in (pipeline.denoiser, pipeline.vae):
        network.float()
    statistics = collect(
        bundle,
        manifest,
        calibration_images,
        _inputs(backend, bundle, manifest, pipeline),
        pipeline,
        folder / FILE,
        smooth=smoothing_exponent,
        attention=attention,
        convolutions=convolutions,
        console=console,
    )
    pictures = [] if stream else _pictures(calibration_images, manifest)
    plan = make_plan(
        pipeline,
        manifest,
        statistics,
        pictures,
        kind,
        method,
        budget,
        attention=attention,
        convolutions=convolutions,
        twice=twice,
        weight_bits=weight_bits,
        everything=everything,
        console=console,
        base=base or PRECISIONS[kind].base,
        sensitivity_file=folder / f"measured-{kind}.json",
    )
    path = plan_file(folder, kind)
    with atomic_write(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
    if plan.sensitivity:
        with atomic_write(path.with_name(f"sensitivity-{kind}.svg")) as partial:
            partial.write_text(draw(plan))
    print_plan(plan, console)
    if plan.empty:
        console.print(f"wrote {path}: no layer fits into the budget. {nothing_planned(plan)}", soft_wrap=True)
        return
    console.print(
        f"wrote {path}; now: densegeo build --model {manifest.model} --precision {kind} --calibration {folder} "
        "(and --checkpoint, --lora, --size as the bundle was built)",
        soft_wrap=True,
        highlight=False,
    )


def _require_plannable(kind: str, method: str, base: str, *, attention: bool, weight_bits: int) -> None:
    """Raises ConfigError for what no plan can hold."""
    if kind not in CALIBRATED:
        raise ConfigError(f"there is no format {kind!r}; there are {', '.join(CALIBRATED)}")
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if attention and not PRECISIONS[kind].attention:
        raise ConfigError(
            f"--attention is for {_ATTENTION}: {kind} would round most of attention's probabilities to zero"
        )
    if weight_bits != PRECISIONS[kind].bits and not PRECISIONS[kind].integer:
        raise ConfigError(f"--weight-bits is for int8: {kind} has one number of bits")
    if base and base not in PRECISIONS[kind].bases:
        raise ConfigError(f"--base {base} is none of {', '.join(PRECISIONS[kind].bases)}")


def _require_two_products(kind: str, budget: Budget, *, convolutions: bool) -> None:
    """Raises ConfigError where no convolution can be in two products."""
    if not PRECISIONS[kind].integer:
        raise ConfigError(f"--twice is for {_EVENLY_SPACED}: the steps of {kind} are of many sizes, so its rests too")
    if not convolutions or budget == Budget():
        raise ConfigError(
            "--twice is for --convolutions within a budget: give --max-depth-error or --max-normal-error too"
        )


def _choose(name: str, manifest: Manifest, device: str, budget: Budget, *, stream: bool) -> str:
    """The backend that runs the bundle; name: the one asked for, or "".

    Raises ConfigError for what could not be found out in this way, before hours go into finding it out.
    """
    if name and not any(row.name == name and row.shows_layers for row in BACKENDS):
        raise ConfigError(f"{name} does not show what enters its linears: use --backend {_SEEN}")
    able = [row.name for row in BACKENDS if row.shows_layers and manifest.base in row.precisions]
    needs_networks = stream or device not in ("auto", "cpu")
    backend = name or (NETWORKS.name if needs_networks else able[0])
    if backend != NETWORKS.name and device not in ("auto", "cpu"):
        raise ConfigError(f"--device {device} goes with --backend {NETWORKS.name}: {backend} counts on the CPU here")
    if stream and (backend, device) != (NETWORKS.name, "cpu"):
        raise ConfigError(f"--stream needs --backend {NETWORKS.name} --device cpu")
    if any(allowance is not None and not allowance > 0 for allowance in (budget.depth, budget.normals)):
        raise ConfigError("--max-depth-error and --max-normal-error must be above 0")
    if stream and budget != Budget():
        raise ConfigError("a budget needs errors, which --stream does not measure")
    if backend not in able:
        raise ConfigError(f"{name} has no {manifest.base}, which the bundle is in: use --backend {' or '.join(able)}")
    return backend


def _inputs(name: str, bundle: Path, manifest: Manifest, pipeline: Pipeline) -> LayerInputs:
    return TorchInputs(pipeline) if name == NETWORKS.name else OnnxInputs(bundle, manifest)


def make_plan(
    pipeline: Pipeline,
    manifest: Manifest,
    statistics: Statistics,
    pictures: list[Any],
    kind: str,
    method: str,
    budget: Budget,
    *,
    attention: bool,
    convolutions: bool,
    twice: bool,
    weight_bits: int,
    everything: bool,
    console: Console,
    base: str,
    sensitivity_file: Path,
) -> QuantizationPlan:
    """Ranges, the error of each layer quantized alone, and what the budget allows.

    pipeline: float32. pictures: inputs of the first bucket to measure errors on; none: nothing is measured, and no
    budget held. attention, convolutions: plan those too. twice: convolutions beyond the budget in two products.
    weight_bits: 8, or 7 of int8. everything: and first, last and thin layers. base: what the rest will be built in.
    sensitivity_file: keeps errors as they are measured, for a run that goes on.
    """
    first_bucket = manifest.buckets[0]
    pipeline.denoiser.resize(first_bucket.size)
    linears, convolution_layers = pipeline.layers(nn.Linear), pipeline.layers(nn.Conv2d) if convolutions else {}
    attentions = [*pipeline.layers(Attention)] if attention else []
    plannable = {*linears, *convolution_layers, *(f"{name}.{part}" for name in attentions for part in PARTS)}

    def fits(name: str) -> bool:
        if name in convolution_layers:
            return everything or convolution_fits(name, convolution_layers[name])
        return everything or pipeline.denoiser.quantizable(name)

    ranges, excluded = input_ranges(statistics, plannable, kind, method, fits)
    work = multiply_adds(pipeline, first_bucket.size)
    plan = QuantizationPlan(
        format=kind,
        method=method,
        smooth=statistics.smooth,
        identity=statistics.identity,
        ranges={name: amax for name, amax in ranges.items() if name in linears},
        attentions={
            name: AttentionPlan(*(ranges[f"{name}.{part}"] for part in PARTS))
            for name in attentions
            if ranges.keys() >= {f"{name}.{part}" for part in PARTS}
        },
        left=excluded,
        budget=budget,
        error=None,
        sensitivity=[],
        parameters=sum(linears[name].weight.numel() for name in ranges if name in linears),
        linear_parameters=sum(layer.weight.numel() for layer in linears.values()),
        base=base,
        convolutions={name: amax for name, amax in ranges.items() if name in convolution_layers},
        weight_bits=weight_bits,
        operations={name: work[name] for name in convolution_layers},
    )
    if not pictures:
        return plan
    doubled = in_two_products(plan.convolutions, statistics) if twice else {}
    few, layers = pictures[:JUDGED], plan.layers(statistics)
    alone = Judge(pipeline, few, plan.numbers, layers)
    names = [*plan.ranges, *plan.attentions, *plan.convolutions]
    sizes = {name: linears[name].weight.numel() for name in plan.ranges}
    measured = SensitivityFile(sensitivity_file, plan, few)
    sensitivity = [
        measured.rows.get(name) or measured.keep(Sensitivity(name, work[name], alone.error([name]), sizes.get(name, 0)))
        for name in track(names, description="one layer at a time", console=console)
    ]
    judge = Judge(pipeline, pictures, plan.numbers, layers, doubled)
    base_error = judge.base_error(base)
    error = judge.error(names) + base_error
    plan = msgspec.structs.replace(plan, sensitivity=sensitivity, error=error, base_error=base_error)
    return plan if budget.share(error) <= 1 else _fit_to_budget(plan, judge, doubled, base_error)


def _fit_to_budget(
    plan: QuantizationPlan, judge: Judge, doubled: Collection[str], base_error: Error
) -> QuantizationPlan:
    """What of a plan its budget allows.

    doubled: the convolutions that are in two products where they do not fit. base_error: the base's own error.
    """

    def in_two(names: Sequence[str]) -> list[str]:
        return [name for name in doubled if name not in names]

    def joint(names: Sequence[str]) -> Error:
        return judge.error(names, in_two(names)) + base_error

    planned, error = within_budget(plan.sensitivity, plan.budget, joint)
    if not planned:
        error = joint([]) if doubled else base_error
    fits = plan.budget.share(error) <= 1
    return msgspec.structs.replace(
        plan.keep(planned, in_two(planned) if fits else ()), error=error if fits else base_error
    )


def _pictures(images: Images, manifest: Manifest) -> list[Any]:
    """Inputs of the first bucket, from images spread over the whole list."""
    pictures: list[Any] = []
    readable = [path for path in images if path not in images.unreadable]
    for path in readable:
        if len(pictures) == JUDGED_TOGETHER:
            break
        try:
            bucket, rgb = rgb_of(path, manifest)
        except ImageError:
            continue
        if bucket is manifest.buckets[0]:
            pictures.append(rgb)
    if not pictures:
        raise ConfigError("no image has the shape of the bundle's first size: add some that have")
    return pictures
