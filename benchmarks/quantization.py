"""What 8 bits cost: `python benchmarks/quantization.py` calibrates fe2e-tiny and scores every precision side by side.

Calibration images are synthetic views of a split of their own, which neither training nor scoring sees. The rows:
float32, bf16, fp8 and int8 as `densegeo calibrate` plans them, fp8 with the products of attention too, and for contrast
naive fp8, which quantizes all linears, first and last layers included, over the whole range seen. 8-bit graphs run on
ONNX Runtime, their floats in float32; the fp8 bundle as a GPU gets it, its floats in bf16, runs emulated in torch.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from densegeo.benchmarks.accuracy import Options, Row, measure, score_table
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.heldout import SIZE, VIEWS, synthetic_split
from densegeo.benchmarks.layouts import Split
from densegeo.benchmarks.metrics import angles
from densegeo.calibration.command import calibrate
from densegeo.calibration.plan import load_plan
from densegeo.cli import guarded
from densegeo.export.build import build_bundle
from densegeo.export.options import BuildOptions
from densegeo.runtime import Estimator
from densegeo.training.render import view

MODEL, SEED, SPLIT = "fe2e-tiny", 0, "calibration"
# name -> precision, base, calibration's folder, and what runs it
BUNDLES: dict[str, tuple[str, str, str, str]] = {
    "fp32": ("fp32", "", "", "onnxruntime"),
    "bf16": ("bf16", "", "", "torch"),
    "fp8": ("fp8", "fp32", "planned", "onnxruntime"),
    "fp8-bf16": ("fp8", "", "planned", "torch"),
    "fp8-attention": ("fp8", "fp32", "attention", "onnxruntime"),
    "int8": ("int8", "fp32", "planned", "onnxruntime"),
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
    everything: bool = False,
) -> None:
    calibrate(
        bundle,
        [str(images)],
        folder,
        kind=kind,
        method=method,
        smooth=0.0,
        max_depth_error=None,
        max_normal_error=None,
        attention=attention,
        everything=everything,
        backend="onnxruntime",
        device="cpu",
        stream=False,
    )


def run(folder: Path, count: int, views: int, json_file: Path | None) -> None:
    machine = environment(("torch", "numpy", "onnxruntime", "onnx"))
    images = folder / "images"
    render_images(images, count)
    float_bundle = build_bundle(BuildOptions(model=MODEL, output=folder / "fp32"))
    for kind in ("fp8", "int8"):
        plan(float_bundle, images, folder / "planned", kind)
    plan(float_bundle, images, folder / "attention", "fp8", attention=True)
    plan(float_bundle, images, folder / "naive", "fp8", "max", everything=True)
    split, rows, shares, places = synthetic_split(views), [], {}, {}
    console = Console()
    for name, (precision, base, calibration, backend) in BUNDLES.items():
        options = BuildOptions(
            model=MODEL,
            output=folder / name,
            precision=precision,
            base=base,
            calibration=folder / calibration if calibration else None,
        )
        places[name] = build_bundle(options), backend
        row = measure([places[name][0]], split, Options(backend, "cpu"), console)[-1]
        rows.append(msgspec.structs.replace(row, predictor=name))
        if calibration:
            planned = load_plan(folder / calibration, precision)
            shares[name] = planned.parameters / planned.linear_parameters
    Console(width=180).print(score_table(split, rows))
    moves = moved(places, split)
    changes = {row.predictor: change(row, rows[0]) | moves[row.predictor] for row in rows[1:]}
    for name, found in changes.items():
        share = f", {shares[name]:.1%} of the linears' parameters in 8 bits" if name in shares else ""
        console.print(
            f"{name}: AbsRel {found['abs_rel']:+.2%}, normals' error {found['normals']:+.3f}°, normals moved by "
            f"{found['moved']:.2f}° in the mean, {found['moved_worst']:.2f}° in the worst view{share}",
            soft_wrap=True,
        )
    if json_file is not None:
        report = {
            "benchmark": "quantization",
            "images": split.count,
            "calibration_images": count,
            "rows": msgspec.to_builtins(rows),
            "changes": changes,
            "shares": shares,
            **machine,
        }
        write_json(json_file, report)


def moved(places: dict[str, tuple[Path, str]], split: Split) -> dict[str, dict[str, float]]:
    """Degrees between each bundle's normals and the first one's: the mean over all views, and over the worst view.

    places: name -> the bundle, and what runs it.
    """
    estimators = {name: Estimator(bundle, backend, "cpu") for name, (bundle, backend) in places.items()}
    found: dict[str, list[float]] = {name: [] for name in places}
    for sample in split.samples():
        made = {name: estimator(sample.rgb).normals for name, estimator in estimators.items()}
        exact, *_ = made.values()
        for name, normals in made.items():
            assert normals is not None and exact is not None  # noqa: PT018
            found[name].append(float(angles(normals, exact).mean()))
    for estimator in estimators.values():
        estimator.close()
    return {name: {"moved": statistics.mean(views), "moved_worst": max(views)} for name, views in found.items()}


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
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Calibrate fe2e-tiny to fp8 and int8, and score every precision on held-out views."""
    guarded(lambda: run(folder, images, views, json_file))


if __name__ == "__main__":
    typer.run(main)
