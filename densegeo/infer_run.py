"""`densegeo infer`, the work: what is there already, what is left to do, and how it went."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from densegeo.errors import DensegeoError
from densegeo.formats import SIDECAR
from densegeo.infer_options import in_options, require_outputs
from densegeo.inference import Making, Tally, run_images
from densegeo.inputs import FoundInputs, Input, in_words, is_live
from densegeo.notices import Notice, Notices
from densegeo.progress import progress
from densegeo.records import Results, bundle_record
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import read_manifest
from densegeo.signals import Terminated, terminable

if TYPE_CHECKING:
    from densegeo.fleet.ray_inference import RayOptions

_SHOWN = 20  # failures, and kinds of warnings, that are printed


@dataclass(frozen=True)
class Run:
    """What the command line asked for, beside how results are made."""

    bundle: Path
    output: Path
    estimator: dict[str, Any]
    workers: int
    skip_existing: bool
    overwrite: bool
    quiet: bool
    as_json: bool
    frames: bool = False
    max_frames: int | None = None
    ray: RayOptions | None = None


def run(job: Run, making: Making, found_inputs: FoundInputs) -> int:
    """Plan, work, and say how it went; the exit code."""
    manifest = read_manifest(job.bundle)
    require_outputs(making, manifest)
    options = {key: job.estimator[key] for key in ("fit", "preprocessing", "resolution")} | making.record()
    maker = {"bundle": bundle_record(job.bundle, manifest), "options": options, "formats": list(making.formats)}
    results = _results(job, maker)
    console = Console(stderr=True)
    tally = Tally(skipped=found_inputs.skipped, notices=Notices(_shower(console, job.quiet), in_options))
    todo = _todo(found_inputs.inputs, results, job, tally)
    listed = results.open_journal()
    try:
        ahead = set(todo)
        for item in found_inputs.inputs:
            if item not in ahead and item.name not in listed:
                results.note(item, "done", files=results.existing(item))
        return _work(job, making, results, todo, tally, console)
    finally:
        results.close()


def _work(job: Run, making: Making, results: Results, todo: list[Input], tally: Tally, console: Console) -> int:
    started, code, begun = time.monotonic(), 0, True
    try:
        with terminable(), tally.notices.collected():
            if todo and job.ray is not None:
                _on_ray(job, making, results, todo, tally, console)
            elif todo:
                _all(job, making, results, todo, tally, console)
    except Terminated as end:
        tally.stopped_by, code = end.name, end.status
    except KeyboardInterrupt:
        tally.stopped_by, code = "Ctrl-C", 130
    except DensegeoError:
        begun = bool(tally.done or tally.failures)  # the error says why
        raise
    finally:
        tally.seconds = time.monotonic() - started
        if begun:
            _summary(job, tally, todo, console)
    return code or (1 if tally.failures else 0)


def _all(job: Run, making: Making, results: Results, todo: list[Input], tally: Tally, console: Console) -> None:
    images, films = ([item for item in todo if item.film == film] for film in (False, True))
    together = job.workers if any(not is_live(item.path) for item in films) else len(images)
    calls = max(1, min(job.workers, together, os.cpu_count() or 1))
    with Estimator(job.bundle, **job.estimator, calls_at_once=calls) as estimator:
        if images:
            with progress("images", len(images), console, quiet=job.quiet) as advance:
                run_images(estimator, images, making, results, tally, job.workers, advance)
        if films:
            from densegeo.film_inference import FilmOptions, run_films

            with progress("frames", None, console, quiet=job.quiet) as advance:
                options = FilmOptions(job.frames, job.max_frames, job.workers)
                run_films(estimator, films, making, results, tally, options, advance)


def _results(job: Run, maker: dict[str, Any]) -> Results:
    if job.ray is None:
        return Results(job.output, maker)
    from densegeo.fleet.ray_inference import results_of

    return results_of(job.output, maker, job.ray.into)


def _on_ray(job: Run, making: Making, results: Results, todo: list[Input], tally: Tally, console: Console) -> None:
    from densegeo.fleet.ray_inference import run_on_ray

    with progress("images", len(todo), console, quiet=job.quiet) as advance:
        run_on_ray(job, making, results, todo, tally, advance)


def _todo(items: list[Input], results: Results, job: Run, tally: Tally) -> list[Input]:
    """What there is to work on, after what is there already. Raises BadParameter before anything is run."""
    if job.overwrite:
        sources = {item.path for item in items}
        clash = [path for item in items for path in _paths(results, item) if path in sources]
        if clash:
            raise typer.BadParameter(f"Results would take the place of the image {clash[0]}.", param_hint="--output")
        return items
    if job.skip_existing:
        states = {item: results.state(item) for item in items}
        if damaged := [item for item, state in states.items() if state == "unreadable"]:
            raise typer.BadParameter(
                f"{len(damaged)} of {len(items)} results in {job.output} cannot be read (the first: "
                f"{damaged[0].name}_{SIDECAR}): it is damaged, or no result. Remove it, replace all with --overwrite, "
                "or choose another folder.",
                param_hint="--skip-existing",
            )
        if foreign := [item for item, state in states.items() if state == "foreign"]:
            raise typer.BadParameter(
                f"{len(foreign)} of {len(items)} results in {job.output} were made of other images, by another "
                "bundle, with other options or in formats that would be lost now "
                f"(the first: {foreign[0].name}). Replace them with --overwrite, or choose another folder.",
                param_hint="--skip-existing",
            )
        complete = [item for item, state in states.items() if state == "whole"]
        if complete:
            tally.skipped["done before"] = len(complete)
            if refused := sum(map(results.refused, complete)):
                tally.skipped["frames that were refused when their films were done"] = refused
        return [item for item, state in states.items() if state != "whole"]
    if existing := [item for item in items if results.existing(item)]:
        folder, _ = results.where(existing[0])
        raise typer.BadParameter(
            f"{len(existing)} of {len(items)} results are in {job.output} already (the first: "
            f"{folder.relative_to(job.output) / results.existing(existing[0])[0]}). Keep them with --skip-existing, "
            "replace them with --overwrite, or choose another folder.",
            param_hint="--output",
        )
    return items


def _paths(results: Results, item: Input) -> list[str]:
    folder, _ = results.where(item)
    return [os.path.abspath(folder / name) for name in results.existing(item)]


def _shower(console: Console, quiet: bool) -> Callable[[Notice], None]:
    """Prints the first warning of each kind, of the first kinds."""
    kinds = 0

    def show(notice: Notice) -> None:
        nonlocal kinds
        kinds += 1
        if not quiet and kinds <= _SHOWN:
            _say(console, "yellow", "warning", _of(notice.source, notice.text))

    return show


def _summary(job: Run, tally: Tally, todo: list[Input], console: Console) -> None:
    if job.as_json:
        import msgspec

        typer.echo(msgspec.json.encode(_record(job, tally, len(todo))).decode())
    if not job.quiet:
        films = any(item.film for item in todo)
        stopped = f"stopped by {tally.stopped_by}: " if tally.stopped_by else ""
        speed = f", {tally.done / tally.seconds:.3g} a second" if tally.done and tally.seconds else ""
        kinds = "images, films and cameras" if films else "images"
        line = f"{stopped}{tally.done} of {len(todo)} {kinds} done{speed}, results in {job.output}"
        console.print(escape(line), soft_wrap=True, highlight=False)
        if tally.skipped:
            console.print(f"left out: {escape(in_words(tally.skipped))}", soft_wrap=True, highlight=False)
        several = [notice for notice in tally.notices.kinds.values() if notice.count > 1]
        for notice in several[:_SHOWN]:
            _say(console, "yellow", "warning", f"{notice.count} times, first of {_of(notice.source, notice.text)}")
        if tally.notices.kinds:
            console.print(f"warnings are listed in {escape(str(job.output))}/results.jsonl", soft_wrap=True)
    for failure in tally.failures[:_SHOWN]:
        _say(console, "red", "failed", _of(failure.where, failure.reason))
    if (more := len(tally.failures) - _SHOWN) > 0:
        _say(console, "red", "failed", f"{more} more, listed in {job.output}/results.jsonl")


def _record(job: Run, tally: Tally, count: int) -> dict[str, Any]:
    """The summary as `--json` prints it."""
    notices = tally.notices.kinds.values()
    return {
        "output": _as_text(str(job.output)),
        "done": tally.done,
        "failed": [
            {"source": _as_text(failure.source), "error": _as_text(failure.reason)}
            | ({} if failure.frame is None else {"frame": failure.frame})
            for failure in tally.failures
        ],
        "skipped": dict(tally.skipped),
        "not_reached": count - tally.done - sum(failure.frame is None for failure in tally.failures),
        "warnings": [
            {"warning": _as_text(notice.text), "first": _as_text(notice.source), "count": notice.count}
            for notice in notices
        ],
        "seconds": round(tally.seconds, 3),
        "stopped_by": tally.stopped_by or None,
    }


def _say(console: Console, colour: str, word: str, text: str) -> None:
    console.print(f"[{colour}]{word}[/] {escape(_as_text(text))}", soft_wrap=True, highlight=False)


def _of(source: str, text: str) -> str:
    """The text after its source, which many errors of files begin with anyway."""
    named = not source or text.startswith((f"{source} ", f"{source}:"))
    return text if named else f"{source}: {text}"


def _as_text(path: str) -> str:
    """A path with the bytes that are no UTF-8 as \\udcXX, which every reader of JSON takes."""
    return path.encode("utf-8", "backslashreplace").decode()
