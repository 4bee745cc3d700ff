"""`densegeo compare`: several benchmark files in tables of 80 columns, and in one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.benchmarks.latency import Latency
from densegeo.errors import ConfigError, ResourceError, ThrottledError
from densegeo.files import atomic_write

Named = tuple[str, Latency]


def read(files: Sequence[Path]) -> list[Named]:
    """Benchmarks by file name, of a file with several with a number. Raises ConfigError for what is no benchmark."""
    out: list[Named] = []
    for file in files:
        try:
            lines = [line for line in file.read_bytes().splitlines() if line.strip()]
            results = [msgspec.json.decode(line, type=Latency) for line in lines]
        except OSError as error:
            raise ConfigError(f"Cannot read {file}: {error.strerror}.") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is no file of `densegeo bench --json`: {error}.") from error
        if not results:
            raise ConfigError(f"{file} is no file of `densegeo bench --json`: it is empty.")
        many = len(results) > 1
        out += [(f"{file.stem}:{number}" if many else file.stem, result) for number, result in enumerate(results, 1)]
    return out


def stages(results: Sequence[Named]) -> list[str]:
    """Every stage that some benchmark has, in the order of running; the total last."""
    names = list(dict.fromkeys(stage for _, result in results for stage in result.stages))
    return [*(name for name in names if name != "total"), "total"]


def refuse_throttled(results: Sequence[Named]) -> None:
    """Raises ThrottledError: a GPU that was slowed says nothing about itself, and a comparison with it misleads."""
    slowed = {name: result.conditions.throttled for name, result in results if result.conditions.throttled}
    if slowed:
        listed = "; ".join(f"{name} ({', '.join(why)})" for name, why in slowed.items())
        raise ThrottledError(
            f"These runs were throttled, and are not compared: {listed}. Let the GPU cool, see to its power and air, "
            "and run `densegeo bench` again."
        )


def print_comparison(results: Sequence[Named], console: Console | None = None) -> None:
    """One row a run: totals against the first, stages, machines, and what is to be doubted. Raises ThrottledError."""
    refuse_throttled(results)
    console = console or Console()
    for table in (_totals(results), _stages(results), _machines(results)):
        console.print(table)
    for name, result in results:
        for doubt in result.conditions.doubts:
            console.print(f"[yellow]{escape(name)}:[/] {doubt}", soft_wrap=True, highlight=False)
    if any(not _alike(result, results[0][1]) for _, result in results):
        console.print("[yellow]Not all are of the first one's model and size: their totals do not compare.[/]")


def _alike(first: Latency, second: Latency) -> bool:
    return (first.model, first.bucket) == (second.model, second.bucket)


def _table(title: str, columns: Sequence[str], left: int) -> Table:
    """The first `left` columns hold words."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        words = index < left
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    return table


def _totals(results: Sequence[Named]) -> Table:
    first = results[0][1]
    table = _table(
        "milliseconds an image, end to end",
        ("run", "model", "backend", "p50", "p90", "p99", "jitter", "speed", "images/s"),
        3,
    )
    for name, result in results:
        total, model = result.stages["total"], f"{result.model} {result.precision}"
        speed = f"{first.stages['total'].p50 / total.p50:.2f}x" if _alike(result, first) else "-"
        best = max(*result.images_per_second.values(), *result.batched_per_second.values())
        times = (_ms(value) for value in (total.p50, total.p90, total.p99, total.jitter))
        table.add_row(escape(name), escape(model), f"{result.backend} {result.device}", *times, speed, f"{best:.1f}")
    return table


def _stages(results: Sequence[Named]) -> Table:
    names = stages(results)
    table = _table("milliseconds of each stage, medians", ("run", *names), 1)
    for name, result in results:
        cells = (_ms(result.stages[stage].p50) if stage in result.stages else "-" for stage in names)
        table.add_row(escape(name), *cells)
    return table


def _machines(results: Sequence[Named]) -> Table:
    table = _table(
        "on what, and how it was", ("run", "machine", "bucket", "runs", "watts", "MHz", "°C", "other load", "error"), 2
    )
    for name, result in results:
        gpu = result.gpu
        others = result.conditions.others
        cells = (
            "-" if gpu is None or gpu.watts is None else f"{gpu.watts.mean:.0f}",
            "-" if gpu is None or gpu.sm_mhz is None else f"{gpu.sm_mhz.mean:.0f}",
            "-" if gpu is None or gpu.celsius is None else f"{gpu.celsius.most:.0f}",
            "-" if others is None else f"{100 * others:.0f} %",
        )
        run = (escape(name), escape(result.device_name), result.bucket, str(result.conditions.runs))
        table.add_row(*run, *cells, f"{result.worst_error:.0e}")
    return table


def _ms(value: float) -> str:
    """Two digits after the point, fewer where there are many before it."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def draw(results: Sequence[Named], path: Path) -> None:
    """Stacked bars, one a run: median milliseconds of each stage, the total at its end, the machine under its name.

    Raises ConfigError without matplotlib or for a suffix that is no picture's, ThrottledError and ResourceError.
    """
    refuse_throttled(results)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("The picture needs matplotlib: pip install matplotlib.") from None
    figure = Figure(figsize=(10, 1.8 + 0.75 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    rows = list(range(len(results)))
    left = [0.0] * len(results)
    for index, stage in enumerate(stages(results)[:-1]):
        widths = [result.stages[stage].p50 if stage in result.stages else 0.0 for _, result in results]
        axes.barh(rows, widths, left=left, label=stage, color=f"C{index % 10}", height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    totals = [result.stages["total"] for _, result in results]
    ends = [max(end, total.p50) for end, total in zip(left, totals, strict=True)]
    # A sum of medians is not the median of sums: the total has a mark of its own.
    axes.plot([total.p50 for total in totals], rows, "k|", markersize=22, markeredgewidth=2, label="total")
    for row, end, total in zip(rows, ends, totals, strict=True):
        axes.text(end, row, f"  {_ms(total.p50)} ms, p99 {_ms(total.p99)}", va="center", fontsize="small")
    labels: Callable[[str, Latency], str] = lambda name, run: (  # noqa: E731
        f"{name}: {run.model} {run.precision} {run.bucket}\n{run.backend}, {run.device_name}"
    )
    axes.set_yticks(rows, [labels(name, result) for name, result in results], fontsize="small")
    axes.set_xlim(0, 1.25 * max(ends))
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds an image: medians of the stages; the total, and its 99th percentile, at the end")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(stages(results)), fontsize="small", frameon=False)
    if (suffix := path.suffix.lower().removeprefix(".")) not in (known := figure.canvas.get_supported_filetypes()):
        raise ConfigError(f"{path} is no picture that can be drawn: name a file that ends in .{', .'.join(known)}.")
    try:
        with atomic_write(path) as partial:
            figure.savefig(partial, dpi=120, format=suffix)
    except OSError as error:
        raise ResourceError(f"Cannot write {path}: {error.strerror}.") from error
