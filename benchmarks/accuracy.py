"""How accurate bundles are: depth and normals on held-out data, beside predictors that do not look at the picture.

The protocol is that of FE2E's released evaluation: the prediction is resized bilinearly to the truth's size, s and t
are fitted per image by least squares (in log space for FE2E) to every pixel at full size, and the aligned depth is
clipped to the dataset's range and scored over all valid pixels; `metrics.py` and `layouts.py` say the rest.

    python benchmarks/accuracy.py out/fe2e-tiny                                        # the frozen synthetic split
    python benchmarks/accuracy.py BUNDLE OTHER --dataset kitti --data kitti_eigen_split_test.tar --list LIST
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from densegeo.arguments import find_bundle
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.heldout import VIEWS, synthetic_split
from densegeo.benchmarks.layouts import DATASETS, Sample, Split, open_split
from densegeo.benchmarks.scores import (
    AnglePool,
    DepthScores,
    NormalScores,
    align,
    angles,
    depth_scores,
    mean_scores,
)
from densegeo.errors import ConfigError, ResourceError
from densegeo.outputs import DepthKind
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.resample import resize_plain

Float = NDArray[np.float32]
SYNTHETIC = "synthetic"
Preprocessing = Literal["densegeo", "authors"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """depth: (H, W) in the space `kind`, or None with it. normals: (H, W, 3), OpenCV frame, or None."""

    depth: Float | None
    kind: DepthKind | None
    normals: Float | None


@dataclass(frozen=True)
class Options:
    """How bundles are opened, as in `Estimator`."""

    backend: str = "auto"
    device: str = "auto"
    preprocessing: Preprocessing = "densegeo"


Predictor = Callable[[Sample], Prediction]


class Row(msgspec.Struct, frozen=True):
    """One predictor on one split. depth and normals are None where the split or the predictor has none."""

    predictor: str
    depth: DepthScores | None  # means over `depth_images`
    normals: NormalScores | None  # pooled over the pixels of `normal_images`
    depth_images: int
    normal_images: int
    skipped: int  # images without a valid pixel, in no score
    model: str | None = None
    precision: str | None = None
    rewrites: list[str] | None = None
    backend: str | None = None
    device: str | None = None


def constant(sample: Sample) -> Prediction:
    """One depth everywhere, fitted per image (its geometric mean), and walls that face the camera."""
    height, width = sample.rgb.shape[:2]
    normals = np.broadcast_to(np.array([0, 0, -1], dtype=np.float32), (height, width, 3))
    return Prediction(np.ones((height, width), dtype=np.float32), "log_affine", normals)


def vertical_gradient(sample: Sample) -> Prediction:
    """ln(depth) falls linearly from top to bottom; the lower half is a level floor, the rest faces the camera."""
    height, width = sample.rgb.shape[:2]
    column = 1 - (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height)  # 1 = top = far
    normals = np.zeros((height, width, 3), dtype=np.float32)
    normals[: height // 2, :, 2] = -1
    normals[height // 2 :, :, 1] = -1
    return Prediction(np.repeat(column[:, None], width, axis=1), "log_affine", normals)


Named = Sequence[tuple[str, Predictor]]
BASELINES: Named = (("constant", constant), ("vertical gradient", vertical_gradient))


def evaluate(split: Split, predictors: Named, advance: Callable[[], object] = lambda: None) -> list[Row]:
    """Scores of each predictor, in one pass over a split; `advance` is called after every image."""
    pools = [AnglePool() for _ in predictors]
    images: list[list[DepthScores]] = [[] for _ in predictors]
    normal_images = [0 for _ in predictors]
    skipped = 0
    for sample in split.samples():
        depths, normals = _any(sample.depth_valid), _any(sample.normals_valid)
        skipped += not (depths or normals)
        for index, (_, predict) in enumerate(predictors if depths or normals else ()):
            prediction = predict(sample)
            if depths and prediction.depth is not None:
                images[index].append(score_depth(sample, prediction, split.depth_range))
            if normals and prediction.normals is not None:
                pools[index].add(normal_angles(sample, prediction.normals))
                normal_images[index] += 1
        advance()
    scored = zip(predictors, images, pools, normal_images, strict=True)
    return [Row(name, mean_scores(each), pool.scores(), len(each), n, skipped) for (name, _), each, pool, n in scored]


def score_depth(sample: Sample, prediction: Prediction, depth_range: tuple[float, float]) -> DepthScores:
    """Scores of one image that has valid depth, after alignment."""
    truth, mask = sample.depth, sample.depth_valid
    assert truth is not None
    assert mask is not None
    assert prediction.depth is not None
    assert prediction.kind is not None
    resized = resize_plain(prediction.depth, truth.shape[1], truth.shape[0])
    aligned = align(resized, truth, mask, prediction.kind, depth_range)
    return depth_scores(aligned, truth[mask].astype(np.float64))


def normal_angles(sample: Sample, predicted: Float) -> NDArray[np.float64]:
    """Degrees (N,) at the valid pixels of one image; predicted: (H, W, 3) of any size."""
    truth, mask = sample.normals, sample.normals_valid
    assert truth is not None
    assert mask is not None
    planes = [resize_plain(predicted[..., axis], truth.shape[1], truth.shape[0])[mask] for axis in range(3)]
    return angles(np.stack(planes, axis=-1), truth[mask])


def _any(mask: NDArray[np.bool_] | None) -> bool:
    return mask is not None and bool(mask.any())


def evaluate_bundle(
    bundle: Path, split: Split, beside: Named, advance: Callable[[], object], options: Options
) -> list[Row]:
    """Rows of the predictors `beside` and of one bundle, which is open only meanwhile."""
    with Estimator(bundle, options.backend, options.device, preprocessing=options.preprocessing) as estimator:

        def predict(sample: Sample) -> Prediction:
            geometry = estimator(sample.rgb)
            return Prediction(geometry.prediction, geometry.depth_kind, geometry.normals)

        *others, row = evaluate(split, [*beside, (str(bundle), predict)], advance)
        manifest = estimator.manifest
        mine = msgspec.structs.replace(
            row,
            model=manifest.model,
            precision=manifest.precision,
            rewrites=manifest.rewrites,
            backend=estimator.backend,
            device=estimator.device,
        )
    return [*others, mine]


DEPTH_COLUMNS = ("AbsRel", "SqRel m", "RMSE m", "RMSE log", "δ1", "δ2", "δ3")
NORMAL_COLUMNS = ("mean°", "median°", "RMSE°", "<5° %", "<7.5° %", "<11.25° %", "<22.5° %", "<30° %")


def score_table(split: Split, rows: list[Row]) -> Table:
    """One line a predictor; columns of a kind that no row has are left out."""
    out = Table(title=f"{split.name}, {split.count} images", show_edge=False)
    out.add_column("predictor", overflow="fold")
    out.add_column("precision")
    depths, normals = (any(getattr(row, kind) is not None for row in rows) for kind in ("depth", "normals"))
    for title in (DEPTH_COLUMNS if depths else ()) + (NORMAL_COLUMNS if normals else ()):
        out.add_column(title, justify="right")
    for row in rows:
        cells: list[str] = []
        if depths:
            cells += [f"{value:.4f}" for value in astuple(row.depth)] if row.depth else ["-"] * len(DEPTH_COLUMNS)
        if normals:
            angles = astuple(row.normals)[1:] if row.normals else ()
            cells += [f"{value:.2f}" for value in angles] or ["-"] * len(NORMAL_COLUMNS)
        out.add_row(escape(row.predictor), row.precision or "-", *cells)
    return out


def _split(dataset: str, data: Path | None, file_list: Path | None, views: int | None) -> Split:
    if dataset == SYNTHETIC:
        if data is not None or file_list is not None:
            raise ConfigError("The synthetic split is rendered, and takes neither --data nor --list.")
        return synthetic_split(views or VIEWS)
    if dataset not in DATASETS:
        raise ConfigError(f"There is no dataset {dataset!r}; choose {', '.join((SYNTHETIC, *DATASETS))}.")
    if data is None:
        raise ConfigError(f"Where is {dataset}? Name its folder or tar with --data.")
    return open_split(DATASETS[dataset], data, file_list, views)


def measure(bundles: list[Path], split: Split, options: Options, console: Console) -> list[Row]:
    """A row for each baseline and each bundle, with a progress bar on `console`."""
    for bundle in bundles:
        read_manifest(bundle)  # the last one's path is wrong? Say so now, not after hours
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        for bundle in bundles:
            task = progress.add_task(escape(str(bundle)), total=split.count)
            beside = () if rows else BASELINES
            rows += evaluate_bundle(bundle, split, beside, partial(progress.advance, task), options)
    return rows


def main(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            parser=find_bundle, metavar="BUNDLES...", help="The bundles' directories, or fe2e-tiny.", show_default=False
        ),
    ],
    dataset: Annotated[str, typer.Option(help=f"{', '.join((SYNTHETIC, *DATASETS))}.")] = SYNTHETIC,
    data: Annotated[Path | None, typer.Option(help="The dataset's folder, or Marigold's tar of it.")] = None,
    file_list: Annotated[Path | None, typer.Option("--list", help="A file list of your own.")] = None,
    views: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the JSON to this file.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the graphs; auto takes the best one installed.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    preprocessing: Annotated[str, typer.Option(help="Resizing of pictures: densegeo or authors.")] = "densegeo",
) -> None:
    """Score bundles on held-out data beside two baselines; the last line is JSON."""
    if preprocessing not in ("densegeo", "authors"):
        raise ConfigError(f"--preprocessing must be densegeo or authors, not {preprocessing!r}.")
    split = _split(dataset, data, file_list, views)
    options = Options(backend, device, cast(Preprocessing, preprocessing))
    rows = measure(bundles, split, options, Console(stderr=True))
    console = Console(width=180)
    console.print(score_table(split, rows))
    if split.note:
        console.print(split.note)
    if skipped := rows[0].skipped:
        console.print(f"{skipped} of {split.count} images have no valid pixel and are in no score")
    line = msgspec.json.encode(
        {
            "benchmark": "accuracy",
            "dataset": split.name,
            "images": split.count,
            "note": split.note,
            "depth_range": split.depth_range,
            "preprocessing": preprocessing,
            "rows": rows,
            **environment(("numpy", "pillow", "onnxruntime", "onnxruntime-gpu")),
        }
    ).decode()
    if json_file is not None:
        try:
            write_json(json_file, json.loads(line))
        except OSError as error:
            raise ResourceError(f"Cannot write {json_file}: {error.strerror}.") from error
    print(line)


if __name__ == "__main__":
    from densegeo.cli import guarded

    guarded(lambda: typer.run(main))
