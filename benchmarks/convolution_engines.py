"""TensorRT engines with 8-bit convolutions at full width: `python benchmarks/convolution_engines.py`. Needs no GPU.

Random weights in the widths of FE2E's autoencoder and of FiffDepth's autoencoder and U-Net, bf16, fp8 and int8, for
each architecture that has the precision, and together for all that one engine can serve. What the builder chose is read
from its log: the type of every convolution, and which layers do nothing but convert numbers on the way to or from one.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.setups import MID, SD2_UNET, SD2_VAE
from densegeo.benchmarks.synthetic import random_fiffdepth
from densegeo.cli import guarded
from densegeo.errors import ConfigError
from densegeo.export.engine_builder import EngineOptions, PlannedEngine, build_engine, planned_engines
from densegeo.export.graph_stats import describe
from densegeo.export.graphs import bucket_examples
from densegeo.export.onnx_graph import export_graph, write_weights
from densegeo.models import fe2e, fiffdepth, rewrites
from densegeo.models.casting import DTYPES, cast
from densegeo.models.layer_plans import LayerPlan, quantize_block
from densegeo.models.quantized import FORMATS, convolution_fits
from densegeo.models.rewrites import Pipeline, stage_of
from densegeo.precision import CALIBRATED, PRECISIONS
from densegeo.runtime.bundle import STAGES, Bucket, Engine, FileDigest, Graph, sha256_file
from densegeo.runtime.engine_log import BuildLog, Layer, parse_log, read_log
from densegeo.size import Size

SIDE = 256
BASE = "bf16"
PRECISION_NAMES = (BASE, *CALIBRATED)
RANGE = 4.0  # of every input: what a builder makes does not depend on it
ARCHITECTURES = (80, 86, 89, 120)
IN_8_BITS = ("FP8", "Int8")  # as the builder's log has them


def targets(precision: str) -> list[tuple[int, ...]]:
    """The architectures that have it, each, and all of them where one engine serves several."""
    row = PRECISIONS[precision]
    able = tuple(number for number in ARCHITECTURES if number >= row.first_architecture)
    return [*((number,) for number in able), *([] if row.engine_each else [able])]


def middle_fe2e() -> Pipeline:
    """With the full autoencoder, which has all of FE2E's convolutions, and a smaller transformer."""
    pipeline = MID.pipeline()
    pipeline.denoiser.resize(Size(SIDE, SIDE))
    return rewrites.apply(pipeline, fe2e.REWRITES)


def full_fiffdepth() -> Pipeline:
    return rewrites.apply(random_fiffdepth(SD2_UNET, SD2_VAE, SIDE), fiffdepth.REWRITES)


MODELS: dict[str, Callable[[], Pipeline]] = {"fe2e": middle_fe2e, "fiffdepth": full_fiffdepth}


def planned(pipeline: Pipeline, precision: str) -> dict[str, LayerPlan]:
    """Every convolution that may become 8-bit; their channels evened out where that is the default."""
    every = {name: layer for name, layer in pipeline.layers(nn.Conv2d).items() if convolution_fits(name, layer)}
    if not PRECISIONS[precision].integer:
        return dict.fromkeys(every, LayerPlan(RANGE))
    return {name: LayerPlan(RANGE, torch.linspace(0.5, 2.0, layer.in_channels)) for name, layer in every.items()}


@torch.no_grad()
def write_graphs(pipeline: Pipeline, folder: Path) -> tuple[Bucket, dict[str, FileDigest]]:
    """Graphs and weights of all networks; the bucket, and what its files are."""
    size, graphs = Size(SIDE, SIDE), dict[str, Graph]()
    examples = bucket_examples(pipeline, size, 1)
    for stage, network in pipeline.stages().items():
        input_spec, output_spec, example = examples[stage]
        weights, path = folder / f"{stage}.safetensors", folder / f"{stage}_{size}.onnx"
        write_weights(network, weights)
        export_graph(network, example, (input_spec, output_spec), weights, path, exact=False)
        graphs[stage] = describe(path)
    files = {path.name: FileDigest(path.stat().st_size, sha256_file(path)) for path in folder.iterdir()}
    encoder, denoiser, decoder = (graphs[stage] for stage in STAGES)
    return Bucket(SIDE, SIDE, encoder, denoiser, decoder), files


def built(folder: Path, target: PlannedEngine, options: EngineOptions, progress: Callable[[str], object]) -> Engine:
    (folder / target.engine.file).parent.mkdir(exist_ok=True)
    return build_engine(folder, folder / target.graph, target.engine, options, target.group, progress)


def scaled_after(log: BuildLog) -> int:
    """8-bit convolutions whose sums go out as float32, for a layer of its own that scales them."""
    return sum(tensor.dtype == "Float" for layer in in_8_bits(log) for tensor in layer.outputs)


def in_8_bits(log: BuildLog) -> list[Layer]:
    """The convolutions with 8-bit operands."""
    every = [layer for layer in log.layers if layer.role == "convolution"]
    return [layer for layer in every if any(name in layer.dtype for name in IN_8_BITS)]


def conversions(log: BuildLog) -> list[str]:
    """Layers beside a convolution that only convert: reformats, and those made of nothing but Q, DQ and casts."""
    beside = {
        tensor.name for layer in log.layers if layer.role == "convolution" for tensor in (*layer.inputs, *layer.outputs)
    }
    return [
        layer.name
        for layer in log.layers
        if _converts(layer) and beside.intersection(tensor.name for tensor in (*layer.inputs, *layer.outputs))
    ]


def surrounded(log: BuildLog) -> list[str]:
    """8-bit convolutions that take what a layer only converted, and whose own numbers one only converts."""
    converting = [layer for layer in log.layers if _converts(layer)]
    written = {tensor.name for layer in converting for tensor in layer.outputs}
    read = {tensor.name for layer in converting for tensor in layer.inputs}
    return [
        layer.name
        for layer in in_8_bits(log)
        if written.intersection(tensor.name for tensor in layer.inputs)
        and read.intersection(tensor.name for tensor in layer.outputs)
    ]


def _converts(layer: Layer) -> bool:
    if "reformat" in layer.kind.lower() or "reformat" in layer.name.lower():
        return True
    names = [node.lower() for node in layer.onnx]
    return bool(names) and all("quantizelinear" in name or "cast" in name for name in names)


def row(folder: Path, model: str, precision: str, engine: Engine, count: int) -> dict[str, Any]:
    """What one engine is. count: of its convolutions that are planned in 8 bits."""
    log = parse_log(read_log(folder / engine.log))
    return {
        "model": model,
        "stage": engine.stage,
        "precision": precision,
        "architectures": engine.architectures,
        "planned": count,
        "convolutions": Counter(layer.dtype for layer in log.layers if layer.role == "convolution"),
        "layers": len(log.layers),
        "conversions": conversions(log),
        "surrounded": surrounded(log),
        "scaled_after": scaled_after(log),
        "seconds": engine.seconds,
        "engine_bytes": (folder / engine.file).stat().st_size,
        "workspace_bytes": engine.activation_bytes,
        "builder_bytes": engine.peak_bytes,
    }


def engines_of(
    model: str, precisions: list[str], stages: list[str], folder: Path, console: Console
) -> Iterator[dict[str, Any]]:
    """A row for each engine of a model."""
    options, exact = EngineOptions(library="tensorrt_rtx", weights="constant").validated(), MODELS[model]()
    for precision in precisions:
        pipeline, plans = copy.deepcopy(exact), dict[str, LayerPlan]()
        if precision != BASE:
            plans = planned(exact, precision)
            for name, part in pipeline.parts():
                quantize_block(part, name, plans, FORMATS[precision], DTYPES[BASE])
        place = folder / model / precision
        place.mkdir(parents=True)
        bucket, files = write_graphs(cast(pipeline, BASE), place)
        counts = Counter(map(stage_of, plans))
        with_convolutions = {stage_of(name) for name in exact.layers(nn.Conv2d)}.intersection(stages)
        for group in targets(precision):
            for target in planned_engines([bucket], precision, group, options, files):
                if target.engine.stage in with_convolutions:
                    console.print(
                        f"{model} {precision} {target.engine.stage} for {', '.join(target.engine.architectures)}"
                    )
                    engine = built(place, target, options, lambda phase: None)
                    yield row(place, model, precision, engine, counts[engine.stage])
                    (place / engine.file).unlink()


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One line an engine."""
    table = Table("model", "stage", "", "for", "convolutions", "planned", "conversions", "surrounded", "scaled after")
    for name in ("s", "MB", "workspace MB"):
        table.add_column(name)
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(row["convolutions"].items()))
        sizes = (f"{row[name] / 1e6:.3g}" for name in ("engine_bytes", "workspace_bytes"))
        table.add_row(
            *(row[name] for name in ("model", "stage", "precision")),
            ", ".join(row["architectures"]),
            kinds,
            str(row["planned"] or ""),
            str(len(row["conversions"])),
            str(len(row["surrounded"])),
            str(row["scaled_after"]),
            f"{row['seconds']:.1f}",
            *sizes,
        )
    return table


def run(models: list[str], precisions: list[str], stages: list[str], json_file: Path | None) -> None:
    for option, names, known in (
        ("model", models, MODELS),
        ("precision", precisions, PRECISION_NAMES),
        ("stage", stages, STAGES),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"there is no {option} {unknown[0]!r} here; there are {', '.join(known)}")
    machine, console, rows = environment(("torch", "onnx", "tensorrt-rtx-cu13")), Console(width=160), []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            for row in engines_of(model, precisions, stages, Path(folder), console):
                rows.append(row)
                if json_file is not None:
                    write_json(json_file, {**machine, "size": [SIDE, SIDE], "engines": rows})
    console.print(table_of(rows))


def main(
    models: Annotated[Optional[list[str]], typer.Argument(help=f"Of {', '.join(MODELS)}; all by default.")] = None,  # noqa: UP045
    precision: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"{', '.join(PRECISION_NAMES)}; all by default."),
    ] = None,
    stage: Annotated[Optional[list[str]], typer.Option(help=f"Of {', '.join(STAGES)}; all by default.")] = None,  # noqa: UP045
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Build engines of full-width convolutions in bf16, fp8 and int8, and say what the builder made of them."""
    guarded(lambda: run(models or list(MODELS), precision or list(PRECISION_NAMES), stage or list(STAGES), json_file))


if __name__ == "__main__":
    typer.run(main)
