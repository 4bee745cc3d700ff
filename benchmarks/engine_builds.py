"""Build times and sizes of TensorRT engines: `python benchmarks/engine_builds.py [BUNDLE...]`. Needs no GPU.

Builds fe2e-tiny's engines in every precision that TensorRT takes, with weights inside and as inputs, at several sizes,
and lists them together with the engines of the bundles given (such as the one that `make fullsize` leaves).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer
from rich.console import Console
from rich.table import Table

from densegeo.benchmarks.environment import environment, write_json
from densegeo.cli import guarded
from densegeo.export.build import build_bundle
from densegeo.export.build_options import BuildOptions
from densegeo.export.engine_builder import EngineOptions
from densegeo.runtime.bundle import Manifest, read_manifest
from densegeo.runtime.engine_log import parse_log, read_log, warnings
from densegeo.size import Size

MODEL = "fe2e-tiny"
SIZES = (Size(256, 192), Size(192, 256), Size(320, 240))
TARGETS = (80, 86, 89, 120)
Weights = Literal["constant", "input"]
KINDS: tuple[tuple[str, Weights], ...] = (
    ("fp32", "constant"),
    ("fp16", "constant"),
    ("fp16", "input"),
    ("bf16", "constant"),
    ("bf16", "input"),
)


def rows(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """One row an engine of a bundle."""
    table_rows = []
    for engine in manifest.engines:
        log = parse_log(read_log(bundle / engine.log))
        roles = [layer.role for layer in log.layers]
        table_rows.append(
            {
                "model": manifest.model,
                "precision": manifest.precision,
                "weights": engine.weights,
                "size": engine.bucket,
                "stage": engine.stage,
                "seconds": engine.seconds,
                "engine_bytes": manifest.files[engine.file].bytes,
                "builder_bytes": engine.peak_bytes,
                "workspace_bytes": engine.activation_bytes,
                "layers": len(roles),
                "fused_attentions": roles.count("attention"),
                "warnings": warnings(log, manifest.precision, float_tail=engine.stage == "decoder"),
                "architectures": engine.architectures,
            }
        )
    return table_rows


def table_of(engines: list[dict[str, Any]]) -> Table:
    """One line a model, precision, way of the weights and stage: the spread over sizes."""
    table = Table(
        "model", "precision", "weights", "stage", "sizes", "build s", "engine MB", "builder MB", "workspace MB"
    )
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in engines:
        groups.setdefault(tuple(row[name] for name in ("model", "precision", "weights", "stage")), []).append(row)
    for key, group in groups.items():
        amounts = [[row["seconds"] for row in group]]
        amounts += [[row[f"{name}_bytes"] / 1e6 for row in group] for name in ("engine", "builder", "workspace")]
        table.add_row(*key, str(len(group)), *(f"{max(values):.3g}" for values in amounts))
    return table


def run(bundles: list[Path], json_file: Path | None) -> None:
    console, machine = Console(), environment(("onnx", "tensorrt", "tensorrt-rtx-cu13"))
    engines = []
    with tempfile.TemporaryDirectory() as folder:
        for precision, weights in KINDS:
            options = BuildOptions(
                model=MODEL,
                output=Path(folder) / f"{precision}-{weights}",
                sizes=SIZES,
                precision=precision,
                backend="tensorrt",
                architectures=TARGETS,
                engines=EngineOptions(weights=weights),
            )
            bundle = build_bundle(options)
            engines += rows(bundle, read_manifest(bundle))
    for bundle in bundles:
        engines += rows(bundle, read_manifest(bundle))
    console.print(table_of(engines))
    if json_file is not None:
        write_json(json_file, {**machine, "engines": engines})


def main(
    bundles: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Bundles whose engines are listed too."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Build fe2e-tiny's engines in every precision, and tabulate what they took."""
    guarded(lambda: run(bundles or [], json_file))


if __name__ == "__main__":
    typer.run(main)
