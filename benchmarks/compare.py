"""`densegeo compare`: several benchmark files in one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.benchmarks.latency import Latency
from densegeo.errors import ConfigError, ResourceError

Named = tuple[str, Latency]


def read(files: Sequence[Path]) -> list[Named]:
    """Benchmarks by file name. Raises ConfigError for a file that is missing or not one of `densegeo bench`."""
    out = []
    for file in files:
        try:
            out.append((file.stem, msgspec.json.decode(file.read_bytes(), type=Latency)))
        except OSError as error:
            raise ConfigError(f"Cannot read {file}: {error.strerror}.") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is no file of `densegeo bench --json`: {error}.") from error
    return out


def stages(results: Sequence[Named]) -> list[str]:
    """Every stage that some benchmark has, in the order of running; the total last."""
    names = list(dict.fromkeys(stage for _, result in results for stage in result.stages))
    return [*(name for name in names if name != "total"), "total"]


def print_comparison(results: Sequence[Named]) -> None:
    """One column a file: median milliseconds of each stage, and how the totals compare with the first file's."""
    table = Table(show_edge=False)
    table.add_column("")
    for name, _ in results:
        table.add_column(escape(name), justify="right")

    def row(label: str, cells: Sequence[str]) -> None:
        table.add_row(label, *(escape(cell) for cell in cells))

    each = [result for _, result in results]
    row("model", [f"{r.model} {r.precision}" for r in each])
    row("backend", [f"{r.backend}, {r.device}" for r in each])
    row("machine", [", ".join(r.machine.get("gpus") or [str(r.machine.get("cpu"))]) for r in each])
    row("image, bucket", [f"{r.image_size[0]}x{r.image_size[1]}, {r.bucket}" for r in each])
    for stage in stages(results):
        row(f"{stage}, ms", [f"{r.stages[stage].p50:.2f}" if stage in r.stages else "-" for r in each])
    row("total p90, ms", [f"{r.stages['total'].p90:.2f}" for r in each])
    row("times the first", [f"{each[0].stages['total'].p50 / r.stages['total'].p50:.2f}" for r in each])
    row("images/s at best", [f"{max(*r.images_per_second.values(), *r.batched_per_second.values()):.2f}" for r in each])
    row("worst error", [f"{r.worst_error:.1e}" for r in each])
    console = Console()
    console.print(table)
    if len({(r.model, r.bucket) for r in each}) > 1:
        console.print("[yellow]These are different models or sizes: the totals do not compare.[/]")


def draw(results: Sequence[Named], path: Path) -> None:
    """Stacked bars, one a file: median milliseconds of each stage. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("The picture needs matplotlib: pip install matplotlib.") from None
    figure = Figure(figsize=(9, 1.5 + 0.6 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{name}: {result.backend}, {result.precision}" for name, result in results]
    left = [0.0] * len(results)
    for stage in stages(results)[:-1]:
        widths = [result.stages[stage].p50 if stage in result.stages else 0.0 for _, result in results]
        axes.barh(names, widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds, medians", title=f"{results[0][1].model} {results[0][1].bucket}")
    axes.legend(ncols=4, fontsize="small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # matplotlib: ValueError for an unknown suffix
        raise ResourceError(f"Cannot write {path}: {error}.") from error
