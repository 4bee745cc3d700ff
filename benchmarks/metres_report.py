"""What benchmarks/metres.py measured as the tables and pictures of docs/metres.md.

python benchmarks/metres_report.py benchmarks/results/metres_views_cpu.json benchmarks/results/metres_paths_cpu.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from numpy.typing import NDArray

from densegeo.benchmarks import recorded
from densegeo.benchmarks.heldout import SEED, VIEWS
from densegeo.benchmarks.noisy import shape_error
from densegeo.errors import CalibrationError
from densegeo.files import atomic_write
from densegeo.runtime import Camera, Estimator

matplotlib.use("Agg")
from matplotlib import pyplot

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metres.md"
WITHIN = (0.58, 0.78)  # of the errors, that one standard deviation should cover
Record = dict[str, Any]


def main(results: Annotated[list[Path], typer.Argument(help="What benchmarks/metres.py --json wrote.")]) -> None:
    """Rewrite the tables between the page's markers, and its pictures beside it."""
    record: Record = {}
    for result in results:
        record |= json.loads(result.read_text())
    text = PAGE.read_text()
    for name, table in TABLES.items():
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise typer.BadParameter(f"{PAGE} has no place for the table {name!r}.")
        text = marked.sub("\\1" + "\n".join(table(record)) + "\n\\2", text)
    with atomic_write(PAGE) as partial:
        partial.write_text(text)
    for name, draw in PICTURES.items():
        figure = draw(record)
        with atomic_write(PAGE.with_name(f"metres-{name}.png")) as partial:
            figure.savefig(partial, dpi=80)
        pyplot.close(figure)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]


def _noise(record: Record) -> list[str]:
    head = [
        "noise of p, normals",
        "AbsRel, seed 0",
        "seed 101",
        "bound",
        "refused",
        "within one sd, seed 0",
        "seed 101",
    ]
    rows = zip(*record["noise"].values(), strict=True)
    return _table(
        head,
        (
            (
                f"{first['noise']:.1%}, {first['degrees']:g}°",
                f"{first['abs_rel']:.4f}",
                f"{second['abs_rel']:.4f}",
                first["bound"],
                f"{first['refused']}, {second['refused']}",
                f"{first['within_one_sigma']:.0%}",
                f"{second['within_one_sigma']:.0%}",
            )
            for first, second in rows
        ),
    )


def _own(record: Record) -> list[str]:
    head = ["fe2e-tiny's own predictions"]
    for run in record["own_predictions"]:
        head += [f"AbsRel, seed {run['seed']}", "over the best line", "refused", "within one sd"]
    rows = []
    for name in record["own_predictions"][0]["median_abs_rel"]:
        row = [name]
        for run in record["own_predictions"]:
            best = run["median_abs_rel"]["best line, shape" if "shape" in name else "best line"]
            inside = run["within_one_sigma"].get(name)
            row += [f"{run['median_abs_rel'][name]:.3f}", f"{run['median_abs_rel'][name] / best:.2f}"]
            row += [str(run["refused"].get(name, 0)) if inside else "", f"{inside:.0%}" if inside else ""]
        rows.append(row)
    return _table(head, rows)


def _anchors(record: Record) -> list[str]:
    wrong = sorted({row["outliers"] for row in record["anchors"]})
    cells = {(row["anchors"], row["outliers"]): row for row in record["anchors"]}
    rows = []
    for count in sorted({row["anchors"] for row in record["anchors"]}):
        row_cells = [cells[count, share] for share in wrong]
        shown = [
            f"{row['over_best_line']:.2f}" + (f" ({row['refused']})" if row["refused"] else "") for row in row_cells
        ]
        rows.append([count, *shown])
    return _table(["anchors", *(f"{share:.0%} wrong" for share in wrong)], rows)


def _paths(record: Record) -> list[str]:
    head = [
        "a frame's evidence",
        "way",
        "jump",
        "of the line",
        "times steadier",
        "line",
        "error, first quarter",
        "last",
    ]
    rows = []
    for evidence, runs in record["paths"].items():
        for way in ("alone", "tracked", "tracked, motion unknown", "best line"):

            def mean(name: str, way: str = way, runs: list[Record] = runs) -> float:
                return float(np.mean([run[way][name] for run in runs if run[way].get(name) is not None]))

            steadier = [mean(name, "alone") / mean(name) for name in ("jump", "line")]
            row = [evidence if way == "alone" else "", way, f"{mean('jump'):.4f}", f"{mean('line'):.4f}"]
            row += ["", ""] if way == "alone" else [f"{steadier[0]:.1f}", f"{steadier[1]:.1f}"]
            rows.append([*row, f"{mean('error_first_quarter'):.3f}", f"{mean('error_last_quarter'):.3f}"])
    return _table(head, rows)


def _motorcycle(record: Record) -> list[str]:
    steps = record["motorcycle"]["largest_step_of_ln_scale"]
    return _table(["fit", "largest step of ln(scale)"], ((name, f"{step:.1%}") for name, step in steps.items()))


TABLES: dict[str, Callable[[Record], list[str]]] = {
    "noise": _noise,
    "own": _own,
    "anchors": _anchors,
    "paths": _paths,
    "motorcycle": _motorcycle,
}


def _noise_picture(record: Record) -> Any:
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    rows = record["noise"][str(SEED)]
    names = [f"{row['noise']:.1%}, {row['degrees']:g}°" for row in rows]
    for seed, runs in record["noise"].items():
        axes.plot(names, [run["abs_rel"] for run in runs], "o-", label=f"normals' scale, seed {seed}")
    axes.plot(names, [row["bound"] for row in rows], "k_--", label="bound")
    axes.set(
        xlabel="noise of the prediction, of normals", ylabel="AbsRel up to scale, mean of 100 views", ylim=(0, None)
    )
    axes.legend(frameon=False)
    return figure


def _coverage_picture(record: Record) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    shares: dict[str, list[float]] = {}
    for runs in record["noise"].values():
        for run in runs:
            shares.setdefault(f"noise {run['noise']:.1%}, {run['degrees']:g}°", []).append(run["within_one_sigma"])
    for run in record["own_predictions"]:
        for name, share in run["within_one_sigma"].items():
            shares.setdefault(f"own: {name}", []).append(share)
    places = np.arange(len(shares))[::-1]
    for index, seed in enumerate(record["noise"]):
        axes.barh(places + 0.2 - 0.4 * index, [row[index] for row in shares.values()], 0.38, label=f"seed {seed}")
    axes.axvspan(*WITHIN, color="0.5", alpha=0.25, label="68 %, give or take 10")
    axes.set_yticks(places, list(shares))
    axes.set(xlabel="share of the errors within one standard deviation", xlim=(0, 1))
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return figure


def _path_picture(record: Record) -> Any:
    figure, rows = pyplot.subplots(2, 1, figsize=(7, 4.6), layout="constrained", sharex=True)
    for axes, evidence in zip(rows, ("one reading at a random pixel", "one reading straight ahead"), strict=True):
        run = record["paths"][evidence][0]
        for way in ("alone", "tracked", "best line"):
            off = np.array([np.nan if value is None else value for value in run[way]["off"]])
            axes.plot(100 * np.expm1(off), label=way, color={"best line": "0.6"}.get(way))
        axes.set(title=evidence, ylabel="depth too large by, %")
    rows[0].legend(frameon=False, ncols=3)
    rows[1].set_xlabel(f"frame of sequence {record['paths'][evidence][0]['seed']}")
    return figure


def _points_picture(record: Record) -> Any:
    """The held-out view whose error is the median: seen from above, true and with three scales."""
    with Estimator("fe2e-tiny") as estimator:
        rows = recorded.views(estimator, SEED, VIEWS)
    scored = []
    for row in rows:
        try:
            scale = row.geometry.to_scale(row.view.intrinsics)
        except CalibrationError:
            continue
        scored.append((shape_error(row.view, scale.depth), row, scale))
    error, row, scaled = sorted(scored, key=lambda entry: entry[0])[len(scored) // 2]
    view, p = row.view, row.geometry.require_prediction("depth")
    depths = {"true": view.depth, "a fixed guess, s = 1": np.exp(p), f"from normals, AbsRel {error:.2f}": scaled.depth}
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.4), layout="constrained", sharex=True, sharey=True)
    middle = np.median(np.log(view.depth[view.valid]))
    for part, (name, depth) in zip(axes, depths.items(), strict=True):
        logs = np.log(depth)
        points = _points(np.exp(logs - np.median(logs[view.valid]) + middle), row)
        part.scatter(points[:, 0], points[:, 2], s=1, c=points[:, 1], cmap="viridis", linewidths=0, rasterized=True)
        part.set(title=name, xlabel="to the right, m")
        part.set_aspect("equal")
    axes[0].set_ylabel("ahead, m")
    far = np.percentile(view.depth[view.valid], 98)
    axes[0].set(xlim=(-0.7 * far, 0.7 * far), ylim=(0, 1.3 * far))
    return figure


def _points(depth: NDArray[Any], row: recorded.Recorded) -> NDArray[Any]:
    height, width = depth.shape
    rays = Camera.of(row.view.intrinsics).rays((width, height))
    return np.asarray((rays * depth[..., None])[row.view.valid][::3])


PICTURES: dict[str, Callable[[Record], Any]] = {
    "noise": _noise_picture,
    "points": _points_picture,
    "path": _path_picture,
    "coverage": _coverage_picture,
}


if __name__ == "__main__":
    typer.run(main)
