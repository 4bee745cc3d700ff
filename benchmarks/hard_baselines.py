"""FiffDepth or FE2E on a CPU against diffusers' modules at their best: channels last, plain and compiled, in the same
precision, with FE2E's batch of one and its connector's outputs computed beforehand.

`python benchmarks/hard_baselines.py --precision bf16` writes a random checkpoint, builds a bundle of each precision and
races our backends against diffusers as loaded, with channels last, and compiled, in one interleaved run a precision,
everything warmed up. `--int8` lets a bundle whose linears and convolutions are int8 run in the same race. Next to the
times stand the shares of what the machine can do at most in that precision: the best of large products and
convolutions, measured in the same run. Wrong numbers get no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from densegeo.backends import BACKENDS
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.fiffdepth import EXACT, LIBRARIES, TWICE, WrongError
from densegeo.benchmarks.fullsize import calibrate
from densegeo.benchmarks.hard_models import MODELS, Diffusers, Image, Outputs, Run
from densegeo.benchmarks.synthetic import patches
from densegeo.benchmarks.timing import ceiling, flops, interleaved, speedup, summary
from densegeo.cli import guarded
from densegeo.errors import ConfigError
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.machine import this_machine
from densegeo.export.sources import SourceOptions
from densegeo.models.casting import DTYPES
from densegeo.processor import saturates_int8
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import STAGES, read_manifest
from densegeo.runtime.verify import relative_error
from densegeo.size import Size

PLAIN = "diffusers as loaded"
HARD = {  # name -> whether channels last, whether compiled; the best of these is what ours are compared with
    "diffusers channels last": (True, False),
    "diffusers channels last, compiled": (True, True),
}
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Contender:
    """Who runs in a race. flops: of one call. bounds: of each output, its largest relative L2 error."""

    run: Run
    flops: float
    bounds: dict[str, float]


@dataclass(frozen=True)
class Race:
    """What runs against what. folder: of checkpoint and bundles. ceiling_size: side of the matrices that find the
    machine's ceiling.
    """

    model: str
    folder: Path
    size: Size
    narrower: int
    runs: int
    ceiling_size: int
    int8: bool = False  # a bundle of int8 linears and convolutions over bf16 takes part

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.model}-{self.narrower}"

    def image(self) -> Image:
        return patches(max(self.size), seed=100)[: self.size.height, : self.size.width]

    def diffusers(self, dtype: torch.dtype, *, channels_last: bool = False, compiled: bool = False) -> Run:
        return MODELS[self.model].load(self.checkpoint, self.size, Diffusers(dtype, channels_last, compiled))


def race(setup: Race, precision: str) -> dict[str, Any]:
    """All contenders of one precision. Raises WrongError before anything is timed."""
    image, dtype = setup.image(), DTYPES[precision]
    reference = setup.diffusers(torch.float32)(image)
    if (spread := reference["prediction"].std()) <= 0.05:
        raise WrongError(f"the picture is saturated: its standard deviation is {spread:.3f}")
    bundles = [build(setup, precision)]  # before anything else takes memory
    bundles += [build_int8(setup)] if setup.int8 else []
    contenders = diffusers_contenders(setup, dtype, reference)
    for bundle in bundles:
        contenders |= our_contenders(bundle, precision, contenders[PLAIN].bounds)
    worst = {name: checked(f"{name} in {precision}", contenders[name], image, reference) for name in contenders}
    times = interleaved({name: partial(row.run, image) for name, row in contenders.items()}, setup.runs, warm_up=1)
    ceiling_flops = ceiling(dtype, size=setup.ceiling_size, runs=setup.runs)
    best = min(HARD, key=lambda name: float(np.median(times[name])))
    rows = {
        name: {
            **summary(seconds),
            **worst[name],
            "gflop": contenders[name].flops / 1e9,
            "of_ceiling": contenders[name].flops / float(np.median(seconds)) / ceiling_flops,
            "speedup": speedup(times[best], seconds),
        }
        for name, seconds in times.items()
    }
    return {"precision": precision, "ceiling_gflops": ceiling_flops / 1e9, "against": best, "rows": rows}


def diffusers_contenders(setup: Race, dtype: torch.dtype, reference: Outputs) -> dict[str, Contender]:
    """diffusers in every way. Its bounds, and ours in the same precision: in float32 what exact rewrites may move, else
    twice what plain diffusers' own rounding does.
    """
    image, plain = setup.image(), setup.diffusers(dtype)
    errors = {name: relative_error(values, reference[name]) for name, values in plain(image).items()}
    bounds = {name: EXACT if dtype == torch.float32 else TWICE * error for name, error in errors.items()}
    work = flops(lambda: plain(image))
    ways = {name: setup.diffusers(dtype, channels_last=last, compiled=jit) for name, (last, jit) in HARD.items()}
    return {name: Contender(run, work, bounds) for name, run in {PLAIN: plain, **ways}.items()}


def our_contenders(bundle: Path, precision: str, bounds: dict[str, float]) -> dict[str, Contender]:
    """Every CPU backend that multiplies what a bundle has. bounds: of the race; of 8 bits its build's."""
    manifest, contenders = read_manifest(bundle), dict[str, Contender]()
    (bucket,) = manifest.buckets
    work = float(sum(getattr(bucket, stage).flops for stage in STAGES))
    for row in BACKENDS:
        if "cpu" not in row.devices or manifest.precision not in row.precisions:
            continue
        if manifest.quantization is not None and (saturates_int8() or not row.convolutions):
            continue
        name = f"densegeo {row.name}" + (f" {manifest.precision}" if manifest.precision != precision else "")
        own = bounds if manifest.quantization is None else manifest.verification.bounds
        contenders[name] = Contender(_estimates(bundle, row.name), work, own)
    return contenders


def _estimates(bundle: Path, backend: str) -> Run:
    estimator = Estimator(bundle, backend, "cpu", check_digests=False)

    def run(image: Image) -> Outputs:
        geometry = estimator(image)
        maps = {"prediction": geometry.prediction, "normals": geometry.normals}
        return {name: values for name, values in maps.items() if values is not None}

    return run


def checked(name: str, contender: Contender, image: Image, reference: Outputs) -> dict[str, Any]:
    """Which output comes nearest to its bound, its error and bound. Raises WrongError for one beyond it."""
    outputs = contender.run(image)
    errors = {output: relative_error(outputs[output], values) for output, values in reference.items()}
    nearest = max(errors, key=lambda output: errors[output] / contender.bounds[output])
    error, bound = errors[nearest], contender.bounds[nearest]
    if not error <= bound:
        raise WrongError(f"{name}: the {nearest} is {error:.1e} from diffusers in float32; the bound is {bound:.1e}")
    return {"output": nearest, "error": error, "bound": bound}


def build(setup: Race, precision: str, calibration: Path | None = None) -> Path:
    """A bundle of one size, kept in the folder by its name; int8 over bf16."""
    return build_bundle(
        BuildOptions(
            model=setup.model,
            source=SourceOptions(checkpoint=str(setup.checkpoint)),
            sizes=(setup.size,),
            precision=precision,
            output=setup.folder / f"{setup.checkpoint.name}-{precision}-{setup.size}",
            backend="onnxruntime" if precision == "fp32" else "openvino",
            calibration=calibration,
        )
    )


def build_int8(setup: Race) -> Path:
    """A bundle of int8 linears and convolutions, from statistics of seeded pictures. There is no budget, because errors
    of random weights say nothing.
    """
    plans = setup.folder / f"{setup.checkpoint.name}-plans-{setup.size}"
    calibrate(build(setup, "fp32"), setup.folder, "int8", max(setup.size), plans, convolutions=True)
    return build(setup, "int8", plans)


def run(setup: Race, precisions: list[str], json_file: Path | None) -> None:
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise ConfigError(f"there is no row in {unknown[0]}; there are {', '.join(PRECISIONS)}")
    if ("bf16" in precisions or setup.int8) and not this_machine().cpu_bf16:
        raise ConfigError("this processor has no bf16, and a figure of emulated products would say nothing")
    machine, console = environment(LIBRARIES), Console()
    MODELS[setup.model].write(setup.checkpoint, setup.narrower)
    races = []
    for precision in precisions:
        races.append(race(setup, precision))
        console.print(table_of(races[-1]))
        if json_file is not None:
            about = {"model": setup.model, "size": list(setup.size), "narrower": setup.narrower, "runs": setup.runs}
            write_json(json_file, {"benchmark": "hard baselines", **about, "races": races, **machine})


def table_of(race: dict[str, Any]) -> Table:
    """One line a contender."""
    title = f"{race['precision']}; the machine's ceiling: {race['ceiling_gflops']:.0f} GFLOP/s"
    table = Table("", "median", f"times as fast as {race['against']}", "of the ceiling", "error", title=title)
    for name, row in race["rows"].items():
        ratio = f"{row['speedup']['median']:.2f}"
        table.add_row(
            name,
            f"{row['median_ms']:.0f} ms",
            ratio,
            f"{row['of_ceiling']:.0%}",
            f"{row['error']:.1e} ({row['output']})",
        )
    return table


def main(
    model: Annotated[
        str, typer.Option(help=f"{' or '.join(MODELS)}: FiffDepth at full width, FE2E at a middle one.")
    ] = "fiffdepth",
    folder: Annotated[Path, typer.Option(help="Where checkpoint and bundles lie.")] = Path("out/hard_baselines"),
    precision: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"Which (repeatable): {', '.join(PRECISIONS)}. fp32 by default."),
    ] = None,
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="WIDTHxHEIGHT of the picture, multiples of 64. 512x512 by default, FE2E's 512x384."),
    ] = None,
    narrower: Annotated[
        int, typer.Option(min=1, max=2, help="2: half the autoencoder's features, a fifth or third of the denoiser's.")
    ] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also race a bundle of int8 linears and convolutions over bf16.")
    ] = False,
    ceiling_size: Annotated[int, typer.Option(help="Side of the matrices that find the ceiling.")] = 4096,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Race our CPU backends against diffusers at its best."""

    def start() -> None:
        if model not in MODELS:
            raise ConfigError(f"there is no model {model!r} here; there are {', '.join(MODELS)}")
        pixels = Size.parse(size) if size is not None else MODELS[model].size
        run(Race(model, folder, pixels, narrower, runs, ceiling_size, int8), precision or ["fp32"], json_file)

    guarded(start)


if __name__ == "__main__":
    typer.run(main)
