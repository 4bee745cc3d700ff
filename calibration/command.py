"""`densegeo calibrate`: a bundle and images -> statistics, and a plan of what becomes fp8 or int8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import msgspec
import typer
from rich.console import Console

from densegeo.arguments import find_bundle, known_device
from densegeo.backends import BACKENDS, NETWORKS
from densegeo.calibration import planning
from densegeo.calibration.collect import Images, collect, open_statistics, rgb_of
from densegeo.calibration.histogram import METHODS
from densegeo.calibration.layer_inputs import LayerInputs, OnnxInputs, TorchInputs
from densegeo.calibration.picture import draw
from densegeo.calibration.plan import (
    Budget,
    QuantizationPlan,
    nothing_planned,
    plan_file,
)
from densegeo.calibration.planning import EVENLY_SPACED, WITH_ATTENTION, PlanOptions, judged, make_plan
from densegeo.calibration.report import print_plan
from densegeo.calibration.statistics import FILE, Identity
from densegeo.errors import ConfigError, ImageError, QuantizationError
from densegeo.files import atomic_write
from densegeo.inputs import find_images
from densegeo.models.rewrites import Pipeline
from densegeo.precision import CALIBRATED, FLOATS, PRECISIONS
from densegeo.runtime.backends.torch_modules import choose_device, load_networks
from densegeo.runtime.bundle import Manifest, check_files, read_manifest
from densegeo.runtime.ready import beside

_SEEN = " or ".join(row.name for row in BACKENDS if row.shows_layers)
# SmoothQuant's exponent of convolutions in evenly spaced numbers, whose channels differ more than linears' do
EVEN = 0.5
_FAST_CONVOLUTIONS = " and ".join(row.name for row in PRECISIONS.values() if row.fast_convolutions)


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
            f"{EVEN} with --convolutions of {EVENLY_SPACED}, else 0.",
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
        typer.Option("--attention", help=f"Plan the two products of each attention too ({WITH_ATTENTION})."),
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
            f"({EVENLY_SPACED}).",
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
    plan_options = PlanOptions(
        format=kind,
        method=method,
        budget=Budget(max_depth_error, max_normal_error),
        base=base or (PRECISIONS[kind].base if kind in PRECISIONS else ""),
        attention=attention,
        convolutions=convolutions,
        twice=twice,
        weight_bits=weight_bits,
        everything=everything,
    ).validated()
    manifest = read_manifest(bundle)
    if manifest.quantization is not None:
        raise ConfigError(f"{bundle} is {manifest.precision} already: calibrate one of {', '.join(FLOATS)}")
    backend = _choose(backend, manifest, device, plan_options.budget, stream=stream)
    check_files(bundle, manifest, digests=True)
    folder = output or beside(bundle, "calibration")
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no folder", param_hint="--output")
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
    even = EVEN * (convolutions and PRECISIONS[kind].integer)
    statistics = open_statistics(
        folder / FILE, Identity.of(manifest), smooth, even, attention=attention, convolutions=convolutions
    )
    inputs = _inputs(backend, bundle, manifest, pipeline)
    collect(statistics, bundle, manifest, calibration_images, inputs, pipeline, folder / FILE, console)
    plan = make_plan(pipeline, manifest, statistics, plan_options)
    if pictures := [] if stream else _pictures(calibration_images, manifest):
        plan = judged(plan, pipeline, statistics, pictures, plan_options, folder / f"measured-{kind}.json", console)
    _write(plan, folder, console)
    if not plan.empty:
        chosen = f" --base {plan.base}" if plan.base != PRECISIONS[kind].base else ""
        console.print(
            f"Now: densegeo build --model {manifest.model} --precision {kind}{chosen} --calibration {folder} "
            "--output NAME (and --checkpoint, --lora, --size as the bundle was built)",
            soft_wrap=True,
            highlight=False,
        )


def _write(plan: QuantizationPlan, folder: Path, console: Console) -> None:
    """The plan and its picture into a folder, and what it amounts to on the terminal."""
    path = plan_file(folder, plan.format)
    with atomic_write(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
    if plan.sensitivity:
        with atomic_write(path.with_name(f"sensitivity-{plan.format}.svg")) as partial:
            partial.write_text(draw(plan))
    print_plan(plan, console)
    nothing = f": no layer fits into the budget. {nothing_planned(plan)}" if plan.empty else ""
    console.print(f"wrote {path}{nothing}", soft_wrap=True, highlight=False)


def _choose(name: str, manifest: Manifest, device: str, budget: Budget, *, stream: bool) -> str:
    """The backend that runs the bundle; name: the one asked for, or "".

    Raises ConfigError for what could not be found out in this way, before hours go into finding it out.
    """
    if name and name not in {row.name for row in BACKENDS}:
        raise ConfigError(f"there is no backend {name!r}: use --backend {_SEEN}")
    if name and not any(row.name == name and row.shows_layers for row in BACKENDS):
        raise ConfigError(f"{name} does not show what enters its layers: use --backend {_SEEN}")
    able = [row.name for row in BACKENDS if row.shows_layers and manifest.base in row.precisions]
    needs_networks = stream or device not in ("auto", "cpu")
    backend = name or (NETWORKS.name if needs_networks else able[0])
    if backend != NETWORKS.name and device not in ("auto", "cpu"):
        raise ConfigError(f"--device {device} goes with --backend {NETWORKS.name}: {backend} counts on the CPU here")
    if stream and (backend, device) != (NETWORKS.name, "cpu"):
        raise ConfigError(f"--stream needs --backend {NETWORKS.name} --device cpu")
    if stream and budget != Budget():
        raise ConfigError("a budget needs errors, which --stream does not measure")
    if backend not in able:
        raise ConfigError(f"{name} has no {manifest.base}, which the bundle is in: use --backend {' or '.join(able)}")
    return backend


def _inputs(name: str, bundle: Path, manifest: Manifest, pipeline: Pipeline) -> LayerInputs:
    return TorchInputs(pipeline) if name == NETWORKS.name else OnnxInputs(bundle, manifest)


def _pictures(images: Images, manifest: Manifest) -> list[Any]:
    """Inputs of the first bucket: the first images that have its shape, each once."""
    pictures: dict[str, Any] = {}
    for path in images:
        if len(pictures) == planning.JUDGED_TOGETHER:
            break
        digest = images.digests[path]
        if path in images.unreadable or digest in pictures:
            continue
        try:
            bucket, rgb = rgb_of(path, manifest)
        except ImageError:
            continue
        if bucket is manifest.buckets[0]:
            pictures[digest] = rgb
    if not pictures:
        raise ConfigError("no image has the shape of the bundle's first size: add some that have")
    return [*pictures.values()]
