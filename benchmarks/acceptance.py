"""Does the real model here score what its authors published? Builds it, verifies it, scores it: one JSON, pass or fail.

    make acceptance CHECKPOINT=out/files DATA=/data/evaluation
    python benchmarks/acceptance.py --checkpoint DIR --data DIR [-- more options of `densegeo build`]

CHECKPOINT: as in `densegeo build --checkpoint`. DATA: a folder with a folder for each set, eth3d and scannet-normals,
each with the files and the list that `benchmarks/layouts.py` describes (Marigold's tar and list; DSINE's folder).
Images are resized as the authors do. Nothing passes but whole sets, through a bundle that `verify` passed here.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from densegeo.arguments import writable_file
from densegeo.benchmarks.accuracy import Options, Preprocessing, Row, measure, score_table
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.layouts import DATASETS, Split, open_split
from densegeo.errors import BackendError, ConfigError, ResourceError
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.verify import verify
from densegeo.size import Size

# How far off a score may be: what 8 bits may cost (docs/precisions.md), and half a percentage point of a share. Chosen
# before any score was measured.
ERROR, ANGLE, SHARE = 0.02, 0.3, 0.5
RULES = {
    "error": f"at most {100 * ERROR:g} % above",
    "angle": f"at most {ANGLE:g} degrees above",
    "share": f"at most {SHARE:g} points below",
}


@dataclass(frozen=True)
class Figure:
    """A published score. score: the field of `DepthScores` or `NormalScores`; percent: what makes percent of it."""

    dataset: str
    kind: Literal["depth", "normals"]
    score: str
    published: float
    rule: Literal["error", "angle", "share"]
    percent: float = 1.0

    def measured(self, row: Row) -> float:
        return float(getattr(getattr(row, self.kind), self.score)) * self.percent

    @property
    def allowed(self) -> float:
        """The worst value that passes."""
        if self.rule == "error":
            return self.published * (1 + ERROR)
        return self.published + ANGLE if self.rule == "angle" else self.published - SHARE

    def met(self, value: float) -> bool:
        """Whether it is as good as published; not for a score that is no number."""
        return value >= self.allowed if self.rule == "share" else value <= self.allowed


@dataclass(frozen=True)
class Published:
    """What a model's authors published, and the sizes at which their evaluation runs those sets."""

    source: str
    sizes: tuple[Size, ...]
    figures: tuple[Figure, ...]


PUBLISHED = {
    "fe2e": Published(
        "FE2E's authors, tables of zero-shot depth and normals",
        (Size(864, 576), Size(1024, 768)),
        (
            Figure("eth3d", "depth", "abs_rel", 0.0379, "error"),
            Figure("eth3d", "depth", "rmse", 0.4701, "error"),
            Figure("eth3d", "depth", "delta1", 98.77, "share", percent=100),
            Figure("scannet-normals", "normals", "mean", 13.8166, "angle"),
            Figure("scannet-normals", "normals", "below_11_25", 67.2134, "share"),
        ),
    )
}


class Outcome(msgspec.Struct, frozen=True):
    """One figure, as published and as measured."""

    dataset: str
    score: str
    published: float
    rule: str
    allowed: float
    measured: float
    met: bool


def open_sets(published: Published, data: Path, views: int | None) -> dict[str, Split]:
    """The sets that were scored, each whole unless `views` cuts it short. Raises DatasetError and ConfigError."""
    if not data.is_dir():
        raise ConfigError(f"{data} is no folder: name the one that holds a folder for each set with --data")
    names = dict.fromkeys(figure.dataset for figure in published.figures)
    return {name: open_split(DATASETS[name], data / name, limit=views) for name in names}


def build(model: str, checkpoint: str, sizes: tuple[Size, ...], bundle: Path, more: list[str]) -> None:
    """`densegeo build`, in a process of its own; the same again is a no-op. Raises BackendError."""
    command = [sys.executable, "-m", "densegeo", "build", "--model", model, "--checkpoint", checkpoint]
    command += [word for size in sizes for word in ("--size", str(size))]
    command += ["--output", str(bundle), *more]
    print(shlex.join(["densegeo", *command[3:]]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise BackendError(f"the build failed (exit {code}): what it said stands above")


def judge(published: Published, rows: dict[str, Row]) -> list[Outcome]:
    """Every figure, held against the bundle's row of its set."""
    outcomes = []
    for figure in published.figures:
        value = figure.measured(rows[figure.dataset])
        met, rule = figure.met(value), RULES[figure.rule]
        outcomes.append(Outcome(figure.dataset, figure.score, figure.published, rule, figure.allowed, value, met))
    return outcomes


def outcome_table(model: str, outcomes: list[Outcome]) -> Table:
    table = Table(title=f"{model}, against what its authors published", title_justify="left", show_edge=False)
    for column in ("set", "score", "published", "here", "allowed", ""):
        table.add_column(column, justify="right" if column in ("published", "here", "allowed") else "left")
    for outcome in outcomes:
        mark = "[green]met[/]" if outcome.met else "[bold red]missed[/]"
        numbers = (f"{value:.4f}" for value in (outcome.published, outcome.measured, outcome.allowed))
        table.add_row(outcome.dataset, outcome.score, *numbers, mark)
    return table


def run(
    model: str,
    checkpoint: str,
    data: Path,
    bundle: Path,
    options: Options,
    *,
    sizes: tuple[Size, ...],
    views: int | None,
    more: list[str],
) -> dict[str, Any]:
    """Everything, from the checkpoint to the verdict, as the JSON has it. Raises densegeo's errors."""
    published = PUBLISHED[model]
    splits = open_sets(published, data, views)  # first: an hour's build is not spent on data that is not there
    build(model, checkpoint, sizes or published.sizes, bundle, more)
    verdict = verify(bundle, options.backend, options.device)
    verdict.require_good(bundle, "Nothing is scored: ")
    console, rows, tables = Console(stderr=True), dict[str, Row](), dict[str, list[Row]]()
    for name, split in splits.items():
        tables[name] = measure([bundle], split, options, console)
        rows[name] = tables[name][-1]
        Console(width=180).print(score_table(split, tables[name]))
    outcomes, manifest = judge(published, rows), read_manifest(bundle)
    partial = [f"{name}: {split.note}" for name, split in splits.items() if split.note]
    Console().print(outcome_table(model, outcomes))
    return {
        "benchmark": "acceptance",
        "passed": not partial and all(outcome.met for outcome in outcomes),
        "partial": partial,
        "model": model,
        "published": published.source,
        "figures": outcomes,
        "preprocessing": options.preprocessing,
        "verified": [verdict.backend, verdict.device, max(check.error / check.bound for check in verdict.served)],
        "sets": tables,
        "bundle": {"build_key": manifest.build_key, "options": manifest.options, "sources": manifest.sources},
        **environment(("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt-rtx-cu13")),
    }


def main(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Option(help="The authors' files, as in `densegeo build --checkpoint`.")],
    data: Annotated[Path, typer.Option(help="A folder that holds a folder for each set, by its name.")],
    model: Annotated[str, typer.Option(help=f"{', '.join(PUBLISHED)}.")] = "fe2e",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle is built.")] = Path("out/acceptance"),
    json_file: Annotated[Path, typer.Option("--json", callback=writable_file, help="The verdict.")] = Path(
        "out/acceptance.json"
    ),
    backend: Annotated[str, typer.Option(help="What runs the bundle; auto takes the best one installed.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    preprocessing: Annotated[str, typer.Option(help="authors, or densegeo with --size.")] = "authors",
    size: Annotated[list[str] | None, typer.Option(help="In place of the authors' sizes (repeatable).")] = None,
    views: Annotated[int | None, typer.Option(min=1, help="A trial on the first so many images: never a pass.")] = None,
) -> None:
    """Build a model, score it on the public sets, compare with its authors' figures. Words after -- go to the build."""
    if model not in PUBLISHED:
        raise ConfigError(f"no published figures are known for {model!r}; there are some for {', '.join(PUBLISHED)}")
    if preprocessing not in ("densegeo", "authors"):
        raise ConfigError(f"--preprocessing must be densegeo or authors, not {preprocessing!r}")
    result = run(
        model,
        checkpoint,
        data,
        output,
        Options(backend, device, cast(Preprocessing, preprocessing)),
        sizes=tuple(Size.parse(text) for text in size or ()),
        views=views,
        more=context.args,
    )
    plain = json.loads(msgspec.json.encode(result))
    try:
        write_json(json_file, plain)
    except OSError as error:
        raise ResourceError(f"Cannot write {json_file}: {error.strerror}.") from error
    console = Console()
    for line in plain["partial"]:
        console.print(f"[yellow]not whole:[/] {escape(line)}", soft_wrap=True)
    console.print(f"[green]passed[/]: {json_file}" if plain["passed"] else f"[bold red]failed[/]: {json_file}")
    if not plain["passed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    from densegeo.cli import guarded

    app = typer.Typer(add_completion=False)
    app.command(context_settings={"allow_extra_args": True})(main)
    guarded(app)
