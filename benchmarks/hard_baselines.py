"""FiffDepth on a CPU against diffusers at its best: channels last, plain and compiled, in the same precision.

`python benchmarks/hard_baselines.py --precision bf16` writes a random checkpoint, builds a bundle of each precision and
races our backends against diffusers as loaded, with channels last, and compiled, in one interleaved run a precision,
everything warmed up. `--int8` lets a bundle whose linears and convolutions are int8 run in the same race. Next to the
times stand the shares of what the machine can do at most in that precision: the best of large products and
convolutions, measured in the same run. Wrong numbers get no time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from densegeo.backends import BACKENDS
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.fiffdepth import EXACT, LIBRARIES, TWICE, WrongError, diffusers_pipeline, write_checkpoint
from densegeo.benchmarks.fullsize import calibrate
from densegeo.benchmarks.synthetic import patches
from densegeo.benchmarks.timing import ceiling, flops, interleaved, speedup, summary
from densegeo.cli import guarded
from densegeo.errors import ConfigError
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.machine import this_machine
from densegeo.export.sources import SourceOptions
from densegeo.models.casting import DTYPES
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import STAGES, Manifest, read_manifest
from densegeo.runtime.verify import relative_error
from densegeo.size import Size

Image = NDArray[np.uint8]
Run = Callable[[Image], NDArray[np.float32]]
# How diffusers runs: name -> what `diffusers_pipeline` is told
DIFFUSERS: dict[str, dict[str, bool]] = {
    "diffusers as loaded": {},
    "diffusers channels last": {"channels_last": True},
    "diffusers channels last, compiled": {"channels_last": True, "compiled": True},
}
HARD = list(DIFFUSERS)[1:]  # the best of which is what ours are compared with
PRECISIONS = ("fp32", "bf16")


def race(
    folder: Path, checkpoint: Path, precision: str, size: int, runs: int, ceiling_size: int, *, int8: bool = False
) -> dict[str, Any]:
    """All contenders of one precision, and an int8 bundle over bf16 where it is asked for.

    Raises WrongError before anything is timed.
    """
    image, dtype = patches(size, seed=100), DTYPES[precision]
    reference = diffusers_pipeline(checkpoint, torch.float32)(image)
    if reference.std() <= 0.05:
        raise WrongError(f"the picture is saturated: its standard deviation is {reference.std():.3f}")
    bundles = [build(folder, checkpoint, precision, size)]  # before anything else takes memory
    bundles += [build_int8(folder, checkpoint, size)] if int8 else []
    contenders: dict[str, Run] = {
        name: diffusers_pipeline(checkpoint, dtype, **options) for name, options in DIFFUSERS.items()
    }
    plain = relative_error(contenders["diffusers as loaded"](image), reference)
    work = dict.fromkeys(contenders, flops(lambda: contenders["diffusers as loaded"](image)))
    bound = EXACT if dtype == torch.float32 else TWICE * plain
    bounds = dict.fromkeys(contenders, bound)
    for bundle in bundles:
        manifest = read_manifest(bundle)
        for row in BACKENDS:
            if "cpu" not in row.devices or manifest.precision not in row.precisions:
                continue
            if manifest.quantization is not None and not (row.runs == "graphs" and row.convolutions):
                continue  # torch's networks emulate 8 bits
            name = f"densegeo {row.name}" + (f" {manifest.precision}" if manifest.precision != precision else "")
            estimator = Estimator(bundle, row.name, "cpu", check_digests=False)
            contenders[name] = lambda image, use=estimator: use(image).require_prediction("depth")  # type: ignore[misc]
            (bucket,) = manifest.buckets
            work[name] = sum(getattr(bucket, stage).flops for stage in STAGES)
            bounds[name] = bound if manifest.quantization is None else prediction_bound(manifest)
    errors = {name: relative_error(run(image), reference) for name, run in contenders.items()}
    for name, error in errors.items():
        if not error <= bounds[name]:
            raise WrongError(
                f"{name} in {precision} is {error:.1e} from diffusers in float32; the bound is {bounds[name]:.1e}"
            )
    calls = {name: (lambda run=run: run(image)) for name, run in contenders.items()}
    times = interleaved(calls, runs, warm_up=1)
    ceiling_flops = ceiling(dtype, size=ceiling_size, runs=runs)
    best = min(HARD, key=lambda name: float(np.median(times[name])))
    rows = {
        name: {
            **summary(seconds),
            "error": errors[name],
            "bound": bounds[name],
            "gflop": work[name] / 1e9,
            "of_ceiling": work[name] / float(np.median(seconds)) / ceiling_flops,
            "speedup": speedup(times[best], seconds),
        }
        for name, seconds in times.items()
    }
    return {
        "precision": precision,
        "ceiling_gflops": ceiling_flops / 1e9,
        "against": best,
        "rows": rows,
    }


def build(folder: Path, checkpoint: Path, precision: str, size: int, calibration: Path | None = None) -> Path:
    """A bundle of one size, kept in `folder` by its name; int8 over bf16."""
    return build_bundle(
        BuildOptions(
            model="fiffdepth",
            source=SourceOptions(checkpoint=str(checkpoint)),
            sizes=(Size(size, size),),
            precision=precision,
            output=folder / f"{checkpoint.name}-{precision}-{size}",
            backend="onnxruntime" if precision == "fp32" else "openvino",
            calibration=calibration,
        )
    )


def build_int8(folder: Path, checkpoint: Path, size: int) -> Path:
    """A bundle of int8 linears and convolutions, from statistics of seeded pictures. There is no budget, because errors
    of random weights say nothing.
    """
    plans = folder / f"{checkpoint.name}-plans-{size}"
    calibrate(build(folder, checkpoint, "fp32", size), folder, "int8", size, plans, convolutions=True)
    return build(folder, checkpoint, "int8", size, plans)


def prediction_bound(manifest: Manifest) -> float:
    """How far the build allowed its prediction to be from float32: twice the emulation's error."""
    return next(check.bound for check in manifest.verification.checks if check.output == "prediction")


def run(
    folder: Path,
    precisions: list[str],
    size: int,
    narrower: int,
    runs: int,
    ceiling_size: int,
    json_file: Path | None,
    *,
    int8: bool = False,
) -> None:
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise ConfigError(f"there is no row in {unknown[0]}; there are {', '.join(PRECISIONS)}")
    if "bf16" in precisions and not this_machine().cpu_bf16:
        raise ConfigError("this processor has no bf16, and a figure of emulated products would say nothing")
    machine, console = environment(LIBRARIES), Console()
    checkpoint = folder / f"checkpoint-{narrower}"
    write_checkpoint(checkpoint, narrower)
    races = []
    for precision in precisions:
        races.append(race(folder, checkpoint, precision, size, runs, ceiling_size, int8=int8))
        console.print(table_of(races[-1]))
        if json_file is not None:
            report = {"benchmark": "hard baselines", "size": [size, size], "narrower": narrower, "runs": runs}
            write_json(json_file, {**report, "races": races, **machine})


def table_of(race: dict[str, Any]) -> Table:
    """One line a contender."""
    title = f"{race['precision']}; the machine's ceiling: {race['ceiling_gflops']:.0f} GFLOP/s"
    table = Table("", "median", f"times as fast as {race['against']}", "of the ceiling", "error", title=title)
    for name, row in race["rows"].items():
        ratio = f"{row['speedup']['median']:.2f}"
        table.add_row(name, f"{row['median_ms']:.0f} ms", ratio, f"{row['of_ceiling']:.0%}", f"{row['error']:.1e}")
    return table


def main(
    folder: Annotated[Path, typer.Option(help="Where checkpoint and bundles lie.")] = Path("out/hard_baselines"),
    precision: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"Which (repeatable): {', '.join(PRECISIONS)}. fp32 by default."),
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the picture, a multiple of 64.")] = 512,
    narrower: Annotated[
        int, typer.Option(min=1, max=2, help="2: half the autoencoder's features, a fifth of the U-Net's.")
    ] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also race a bundle of int8 linears and convolutions over bf16.")
    ] = False,
    ceiling_size: Annotated[int, typer.Option(help="Side of the matrices that find the ceiling.")] = 4096,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Race our CPU backends against diffusers at its best."""
    guarded(lambda: run(folder, precision or ["fp32"], size, narrower, runs, ceiling_size, json_file, int8=int8))


if __name__ == "__main__":
    typer.run(main)
