"""What 8 bits cost: `python benchmarks/quantization.py` calibrates fe2e-tiny and scores every precision side by side.

Calibration images are synthetic views of a split of their own, which neither training nor scoring sees. The rows:
float32, bf16, fp8 and int8 as `densegeo calibrate` plans them, fp8 with the products of attention too, fp8 and int8
with the convolutions of encoder and decoder too (all that may; int8 also within a budget of a degree, the others in two
products, and with weights of 7 bits), and for contrast naive fp8, which quantizes all linears, first and last layers
included, over the whole range seen.
8-bit graphs run on ONNX Runtime, with int8 convolutions on OpenVINO and with fp8 ones in torch, their floats in
float32. Bundles as a GPU gets them, their floats in bf16, run in torch, where the processor has bf16: on others a view
takes half a minute, and these rows are left out.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any, Optional

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from densegeo.benchmarks.accuracy import Prediction, Predictor, Row, evaluate, score_table
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.heldout import SIZE, VIEWS, synthetic_split
from densegeo.benchmarks.layouts import Sample, Split
from densegeo.benchmarks.scores import angles
from densegeo.calibration.command import calibrate
from densegeo.calibration.plan import load_plan
from densegeo.cli import guarded
from densegeo.errors import ConfigError
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.machine import this_machine
from densegeo.precision import PRECISIONS
from densegeo.runtime import Estimator
from densegeo.training.render import view

MODEL, SEED, SPLIT = "fe2e-tiny", 0, "calibration"
EXACT = "fp32"  # the row that the others are compared with
BUDGET = 1.0  # degrees that normals may move on calibration's images, of the plan within a budget
# name -> precision, base, calibration's folder, and what runs it
BUNDLES: dict[str, tuple[str, str, str, str]] = {
    "fp32": ("fp32", "", "", "onnxruntime"),
    "bf16": ("bf16", "", "", "torch"),
    "fp8": ("fp8", "fp32", "planned", "onnxruntime"),
    "fp8-bf16": ("fp8", "", "planned", "torch"),
    "fp8-attention": ("fp8", "fp32", "attention", "onnxruntime"),
    "fp8-convolutions": ("fp8", "fp32", "uneven", "torch"),
    "int8": ("int8", "fp32", "planned", "onnxruntime"),
    "int8-convolutions": ("int8", "fp32", "convolutions", "openvino"),
    "int8-convolutions-budget": ("int8", "fp32", "budget", "openvino"),
    "int8-convolutions-7": ("int8", "fp32", "7-bit", "openvino"),
    "int8-convolutions-torch": ("int8", "fp32", "convolutions", "torch"),
    "int8-convolutions-bf16": ("int8", "", "convolutions", "torch"),
    "fp8-naive": ("fp8", "fp32", "naive", "onnxruntime"),
}


def render_images(folder: Path, count: int) -> None:
    """Views of the calibration split as PNG files; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in track(range(count), description="rendering"):
        path = folder / f"{index:04d}.png"
        if not path.exists():
            Image.fromarray(view(SEED, SPLIT, index, *SIZE).rgb).save(path)


def plan(
    bundle: Path,
    images: Path,
    folder: Path,
    kind: str,
    method: str = "mse",
    *,
    attention: bool = False,
    convolutions: bool = False,
    twice: bool = False,
    weight_bits: int = 8,
    max_normal_error: float | None = None,
    everything: bool = False,
) -> None:
    calibrate(
        bundle,
        [str(images)],
        folder,
        kind=kind,
        method=method,
        smooth=None,
        max_depth_error=None,
        max_normal_error=max_normal_error,
        attention=attention,
        convolutions=convolutions,
        twice=twice,
        weight_bits=weight_bits,
        everything=everything,
        backend="onnxruntime",
        base="fp32",  # the plan's own figures are of what is 8-bit alone
        device="cpu",
        stream=False,
    )


def make_plans(bundle: Path, images: Path, folder: Path, planned: set[tuple[str, str]]) -> None:
    """The plans of the calibrations and formats that are wanted, each in its folder."""
    for kind in ("fp8", "int8"):
        if ("planned", kind) in planned:
            plan(bundle, images, folder / "planned", kind)
    if ("attention", "fp8") in planned:
        plan(bundle, images, folder / "attention", "fp8", attention=True)
    if ("uneven", "fp8") in planned:
        plan(bundle, images, folder / "uneven", "fp8", convolutions=True)
    if ("naive", "fp8") in planned:
        plan(bundle, images, folder / "naive", "fp8", "max", everything=True)
    if planned.isdisjoint((name, "int8") for name in ("convolutions", "budget", "7-bit")):
        return
    plan(bundle, images, folder / "convolutions", "int8", convolutions=True)
    for name, options in (
        ("budget", {"max_normal_error": BUDGET, "twice": True}),
        ("7-bit", {"weight_bits": 7}),
    ):
        if (name, "int8") in planned:
            shutil.copytree(folder / "convolutions", folder / name, dirs_exist_ok=True)  # the same statistics
            plan(bundle, images, folder / name, "int8", convolutions=True, **options)


def run(folder: Path, count: int, views: int, only: list[str], json_file: Path | None) -> None:
    if unknown := [name for name in only if name not in BUNDLES]:
        raise ConfigError(f"there is no row {unknown[0]!r}; there are {', '.join(BUNDLES)}")
    machine = environment(("torch", "numpy", "onnxruntime", "onnx", "openvino"))
    images = folder / "images"
    render_images(images, count)
    float_bundle = build_bundle(BuildOptions(model=MODEL, output=folder / "fp32"))
    names = [name for name in BUNDLES if not only or name in only or name == EXACT]
    left_out = [name for name in names if needs_bf16(name) and not this_machine().cpu_bf16]
    names = [name for name in names if name not in left_out]
    make_plans(float_bundle, images, folder, {(BUNDLES[name][2], BUNDLES[name][0]) for name in names})
    split, shares, places = synthetic_split(views), dict[str, dict[str, float]](), {}
    console = Console(width=180)
    console.print(f"left out, because this processor has no bf16: {', '.join(left_out) or 'none'}")
    for name in names:
        precision, base, calibration, backend = BUNDLES[name]
        options = BuildOptions(
            model=MODEL,
            output=folder / name,
            precision=precision,
            base=base,
            calibration=folder / calibration if calibration else None,
            backend=backend,
        )
        console.print(f"building {name}")
        places[name] = build_bundle(options), backend
        if calibration:
            planned = load_plan(folder / calibration, precision)
            shares[name] = {
                "linears": planned.parameters / planned.linear_parameters,
                "convolutions": planned.convolution_share,
                "in two products": planned.share_of(planned.twice),
            }
    rows, moves = scored(places, split, console)
    console.print(score_table(split, rows))
    changes = {row.predictor: change(row, rows[0]) | moves[row.predictor] for row in rows[1:]}
    console.print(change_table(changes, shares))
    if json_file is not None:
        report = {
            "benchmark": "quantization",
            "images": split.count,
            "calibration_images": count,
            "rows": msgspec.to_builtins(rows),
            "changes": changes,
            "shares": {name: share["linears"] for name, share in shares.items()},
            "convolution_shares": {name: share["convolutions"] for name, share in shares.items()},
            "twice_shares": {name: share["in two products"] for name, share in shares.items()},
            "left_out": left_out,
            **machine,
        }
        write_json(json_file, report)


def needs_bf16(name: str) -> bool:
    """Whether a bundle's floats are bf16."""
    precision, base, _, _ = BUNDLES[name]
    return (base or PRECISIONS[precision].base) == "bf16"


def change_table(changes: dict[str, dict[str, float]], shares: dict[str, dict[str, float]]) -> Table:
    """One line a precision: how much is in 8 bits, and what that changes."""
    head = "8-bit linears", "8-bit convolutions", "in two products"
    table = Table("", *head, "AbsRel", "normals' error", "normals moved", "worst view")
    for name, change in changes.items():
        amounts = (f"{share:.1%}" if share else "" for share in shares.get(name, dict.fromkeys(head, 0.0)).values())
        degrees = (f"{change['normals']:+.3f}°", f"{change['moved']:.2f}°", f"{change['moved_worst']:.2f}°")
        table.add_row(name, *amounts, f"{change['abs_rel']:+.2%}", *degrees)
    return table


def scored(
    places: dict[str, tuple[Path, str]], split: Split, console: Console
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """A row for each bundle, and of each the degrees between its normals and the first one's: the mean over all views,
    and over the worst view.

    places: name -> the bundle, and what runs it.
    """
    estimators = {name: Estimator(bundle, backend, "cpu") for name, (bundle, backend) in places.items()}
    angles_of: dict[str, list[float]] = {name: [] for name in places}
    exact: list[NDArray[np.float32]] = []  # normals of the first bundle for the last view

    def predictor(name: str) -> Predictor:
        def predict(sample: Sample) -> Prediction:
            geometry = estimators[name](sample.rgb)
            assert geometry.normals is not None
            if name == next(iter(places)):
                exact[:] = [geometry.normals]
            angles_of[name].append(float(angles(geometry.normals, exact[0]).mean()))
            return Prediction(geometry.prediction, geometry.depth_kind, geometry.normals)

        return predict

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("views", total=split.count)
        rows = evaluate(split, [(name, predictor(name)) for name in places], lambda: progress.advance(task))
    scored_rows = []
    for row, estimator in zip(rows, estimators.values(), strict=True):
        manifest = estimator.manifest
        fields = {"model": manifest.model, "precision": manifest.precision, "rewrites": manifest.rewrites}
        scored_rows.append(msgspec.structs.replace(row, backend=estimator.backend, device=estimator.device, **fields))
        estimator.close()
    return scored_rows, {
        name: {"moved": statistics.mean(views), "moved_worst": max(views)} for name, views in angles_of.items()
    }


def change(row: Row, exact: Row) -> dict[str, Any]:
    """Of the mean AbsRel, relative; of the mean normal error, in degrees."""
    assert row.depth and exact.depth and row.normals and exact.normals  # noqa: PT018
    return {
        "abs_rel": row.depth.abs_rel / exact.depth.abs_rel - 1,
        "normals": row.normals.mean - exact.normals.mean,
    }


def main(
    folder: Annotated[Path, typer.Option(help="Where images, plans and bundles go.")] = Path("out/quantization"),
    images: Annotated[int, typer.Option(min=8, help="Views to calibrate with.")] = 64,
    views: Annotated[int, typer.Option(min=1, help="Held-out views to score.")] = VIEWS,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"This row, and {EXACT}'s (repeatable): {', '.join(BUNDLES)}."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Calibrate fe2e-tiny to fp8 and int8, and score every precision on held-out views."""
    guarded(lambda: run(folder, images, views, only or [], json_file))


if __name__ == "__main__":
    typer.run(main)
