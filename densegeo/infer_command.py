"""`densegeo infer`: options, all checked before the bundle is loaded, what is to be done, and a summary."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape

from densegeo.arguments import Backend, Bundle, Device, Number, Whole
from densegeo.backends import NAMES, installed
from densegeo.errors import ConfigError, DensegeoError
from densegeo.formats import FILM_EXTRA, FILM_MODULE, RESULTS

if TYPE_CHECKING:
    from densegeo.inference import Making, Tally
    from densegeo.inputs import Found, Input
    from densegeo.records import Results
    from densegeo.runtime.bundle import Manifest
    from densegeo.runtime.camera import Camera

_SHOWN = 20  # failures that the summary lists


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


def infer(
    bundle: Bundle,
    inputs: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            help="Images, folders (searched recursively), globs; - for a list of them on standard input. Films, and "
            "cameras by address (rtsp://..., /dev/video0).",
            show_default=False,
        ),
    ] = None,
    list_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--list", help="A file with one path a line (or NUL between them)."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("out"),
    formats: Annotated[str, typer.Option("--format", "-f", help=f"Comma-separated: {', '.join(RESULTS)}.")] = "npy,png",
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Keep results that are there; also goes on after an interruption.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
    fit: Annotated[str, typer.Option(help="How an image meets a bucket: stretch or pad.")] = "stretch",
    preprocessing: Annotated[
        str, typer.Option(help="Resizing: densegeo (antialiased) or authors (as in the released code).")
    ] = "densegeo",
    near: Annotated[Number, typer.Option(help="Depth in metres of the nearest point; goes with --far.")] = None,
    far: Annotated[Number, typer.Option(help="Depth in metres of the farthest point.")] = None,
    scale: Annotated[Number, typer.Option(help="Known scale s of the prediction; goes with --shift.")] = None,
    shift: Annotated[Number, typer.Option(help="Known shift t of the prediction.")] = None,
    fx: Annotated[Number, typer.Option(help="Focal length in pixels; ply and glb need fx, fy, cx, cy.")] = None,
    fy: Annotated[Number, typer.Option(help="Focal length in pixels.")] = None,
    cx: Annotated[Number, typer.Option(help="Principal point in pixels.")] = None,
    cy: Annotated[Number, typer.Option(help="Principal point in pixels.")] = None,
    fov: Annotated[Number, typer.Option(help="Horizontal field of view in degrees, instead of fx, fy, cx, cy.")] = None,
    camera: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="ROS' camera_info (YAML or JSON), instead of fx, fy, cx, cy; its lens is undistorted."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Numbers in npy, npz and exr: float32 or float16.")] = "float32",
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Images read, run and saved at once; each needs an image's memory.")
    ] = 3,
    frames: Annotated[
        bool, typer.Option("--frames", help="Of films and cameras, save each frame's results too.")
    ] = False,
    max_frames: Annotated[Whole, typer.Option(min=1, help="Frames to take of each film or camera.")] = None,
    threads: Annotated[
        Whole, typer.Option(min=1, help="Of the CPU, for the networks; by default the backend decides.")
    ] = None,
    resolution: Annotated[
        str, typer.Option(help="Results at the size of the image, or as the network made them: image or network.")
    ] = "image",
    backend: Backend = "auto",
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary; errors alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
) -> None:
    """Depth and normals of images, films and cameras, saved to a folder that mirrors the images' folders.

    Ends with 0 when all was done, 1 when some failed, 2 for wrong options, 130 after Ctrl-C and 143 after SIGTERM.
    """
    from densegeo.inference import Making

    making = Making(
        formats=_formats(formats),
        depth_range=_range(near, far),
        scale_shift=_line(scale, shift),
        intrinsics=_camera(_intrinsics(fx, fy, cx, cy), fov, camera),
        fov=fov,
        dtype=_choice("--dtype", dtype, ("float32", "float16")),
    )
    if making.depth_range and making.scale_shift:
        raise typer.BadParameter("Give either --near and --far or --scale and --shift, not both.")
    _require_what_formats_need(making)
    if skip_existing and overwrite:
        raise typer.BadParameter("Give either --skip-existing or --overwrite, not both.")
    _choice("--fit", fit, ("stretch", "pad"))
    _choice("--preprocessing", preprocessing, ("densegeo", "authors"))
    if preprocessing == "authors" and fit == "pad":
        raise typer.BadParameter("--preprocessing authors stretches: leave --fit pad out.", param_hint="--fit")
    _choice("--backend", backend, ("auto", *NAMES))
    _device(device)
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; name a folder.", param_hint="--output")
    _choice("--resolution", resolution, ("image", "network"))
    options: dict[str, Any] = {"backend": backend, "device": device, "fit": fit, "preprocessing": preprocessing}
    options |= {"threads": threads, "resolution": resolution}
    asked = Run(bundle, output, options, workers, skip_existing, overwrite, quiet, as_json, frames, max_frames)
    code = run(asked, making, _inputs(inputs or [], list_file, output))
    if code:
        raise typer.Exit(code)


def run(asked: Run, making: Making, found: Found) -> int:
    """Plan, work, and say how it went; the exit code."""
    from densegeo.inference import Tally
    from densegeo.records import Results, bundle_record
    from densegeo.runtime.bundle import read_manifest

    manifest = read_manifest(asked.bundle)
    _require_outputs(making, manifest)
    options = {key: asked.estimator[key] for key in ("fit", "preprocessing", "resolution")}
    options |= {"depth_range": _listed(making.depth_range), "scale_shift": _listed(making.scale_shift)}
    options |= {"intrinsics": making.camera_record(), "dtype": making.dtype}
    maker = {"bundle": bundle_record(asked.bundle, manifest), "options": options, "formats": list(making.formats)}
    results = Results(asked.output, maker)
    tally = Tally(skipped=found.skipped)
    todo = _todo(found.inputs, results, asked, tally)
    listed = results.open_journal()
    try:
        ahead = set(todo)
        for item in found.inputs:
            if item not in ahead and item.name not in listed:
                results.note(item, "done", files=results.existing(item))
        return _work(asked, making, results, todo, tally)
    finally:
        results.close()


def _work(asked: Run, making: Making, results: Results, todo: list[Input], tally: Tally) -> int:
    import time

    from densegeo.film_inference import FilmOptions, run_films
    from densegeo.inference import run_images
    from densegeo.progress import progress
    from densegeo.runtime import Estimator
    from densegeo.signals import Terminated, terminable

    console, started = Console(stderr=True), time.monotonic()
    code = 0
    try:
        with terminable():
            if todo:
                images, films = ([item for item in todo if item.film == film] for film in (False, True))
                with Estimator(asked.bundle, **asked.estimator) as estimator:
                    if images:
                        with progress("images", len(images), console, quiet=asked.quiet) as advance:
                            run_images(estimator, images, making, results, tally, asked.workers, advance)
                    if films:
                        with progress("frames", None, console, quiet=asked.quiet) as advance:
                            options = FilmOptions(asked.frames, asked.max_frames, asked.workers)
                            run_films(estimator, films, making, results, tally, options, advance)
    except Terminated:
        tally.stopped_by, code = "SIGTERM", 143
    except KeyboardInterrupt:
        tally.stopped_by, code = "Ctrl-C", 130
    finally:
        tally.seconds = time.monotonic() - started
        _summary(asked, tally, todo, console)
    return code or (1 if tally.failures else 0)


def _todo(items: list[Input], results: Results, asked: Run, tally: Tally) -> list[Input]:
    """What there is to work on, after what is there already. Raises BadParameter before anything is run."""
    if asked.overwrite:
        sources = {item.path for item in items}
        clash = [path for item in items for path in _paths(results, item) if path in sources]
        if clash:
            raise typer.BadParameter(f"Results would take the place of the image {clash[0]}.", param_hint="--output")
        return items
    if asked.skip_existing:
        states = {item: results.state(item) for item in items}
        if foreign := [item for item, state in states.items() if state == "foreign"]:
            raise typer.BadParameter(
                f"{len(foreign)} of {len(items)} results in {asked.output} were made of other images, by another "
                f"bundle or with other options (the first: {foreign[0].name}). Replace them with --overwrite, or "
                "choose another folder.",
                param_hint="--skip-existing",
            )
        whole = [item for item, state in states.items() if state == "whole"]
        if whole:
            tally.skipped["done before"] = len(whole)
        return [item for item, state in states.items() if state != "whole"]
    if there := [item for item in items if results.existing(item)]:
        raise typer.BadParameter(
            f"{len(there)} of {len(items)} results are in {asked.output} already (the first: "
            f"{results.existing(there[0])[0]}). Keep them with --skip-existing, replace them with --overwrite, or "
            "choose another folder.",
            param_hint="--output",
        )
    return items


def _paths(results: Results, item: Input) -> list[str]:
    folder, _ = results.where(item)
    return [os.path.abspath(folder / name) for name in results.existing(item)]


def _summary(asked: Run, tally: Tally, todo: list[Input], console: Console) -> None:
    from densegeo.inputs import in_words

    count, films = len(todo), any(item.film for item in todo)
    if asked.as_json:
        import msgspec

        record = {
            "output": _as_text(str(asked.output)),
            "done": tally.done,
            "failed": [{"source": _as_text(path), "error": _as_text(reason)} for path, reason in tally.failures],
            "skipped": dict(tally.skipped),
            "not_reached": count - tally.done - len(tally.failures),
            "seconds": round(tally.seconds, 3),
            "stopped_by": tally.stopped_by or None,
        }
        typer.echo(msgspec.json.encode(record).decode())
    if not asked.quiet:
        stopped = f"stopped by {tally.stopped_by}: " if tally.stopped_by else ""
        speed = f", {tally.done / tally.seconds:.3g} a second" if tally.done and tally.seconds else ""
        what = "images" if not films else "images, films and cameras"
        line = f"{stopped}{tally.done} of {count} {what} done{speed}, results in {asked.output}"
        console.print(escape(line), soft_wrap=True, highlight=False)
        if tally.skipped:
            left_out = in_words(tally.skipped)
            console.print(f"left out: {escape(left_out)}", soft_wrap=True, highlight=False)
    for path, reason in tally.failures[:_SHOWN]:
        line = escape(f"{_as_text(path)}: {_as_text(reason)}")
        console.print(f"[red]failed[/] {line}", soft_wrap=True, highlight=False)
    if (more := len(tally.failures) - _SHOWN) > 0:
        console.print(
            f"[red]failed[/] {more} more, listed in {escape(str(asked.output))}/results.jsonl", soft_wrap=True
        )


def _as_text(path: str) -> str:
    """A path with the bytes that are no UTF-8 as \\udcXX, which every reader of JSON takes."""
    return path.encode("utf-8", "backslashreplace").decode()


def _inputs(arguments: list[str], list_file: str | None, output: Path) -> Found:
    from densegeo.errors import ImageError
    from densegeo.inputs import find_inputs, read_list

    try:
        given = [argument for argument in arguments if argument != "-"]
        listed = [path for name in arguments if name == "-" for path in read_list(name)]
        if list_file is not None:
            listed += read_list(list_file)
        if not given and not listed:
            raise ImageError("There is nothing to work on: name images or folders, or a list with --list.")
        found = find_inputs(given, output, listed)
    except ImageError as error:
        raise typer.BadParameter(str(error), param_hint="INPUTS") from error
    if any(item.film for item in found.inputs) and not installed(FILM_MODULE):
        hint = f'Films and cameras need {FILM_MODULE}: pip install "densegeo[{FILM_EXTRA}]".'
        raise typer.BadParameter(hint, param_hint="INPUTS")
    return found


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise typer.BadParameter("names no format; try --format npy,png.", param_hint="--format")
    for name in names:
        if name not in RESULTS:
            near = f" Did you mean {name.lower()}?" if name.lower() in RESULTS else ""
            raise typer.BadParameter(
                f"There is no format {name!r}; choose from {', '.join(RESULTS)}.{near}", param_hint="--format"
            )
        row = RESULTS[name]
        if row.module and not installed(row.module):
            hint = f'{name} needs {row.module}: pip install "densegeo[{row.extra}]".'
            raise typer.BadParameter(hint, param_hint="--format")
    return names


def _require_what_formats_need(making: Making) -> None:
    metric = making.depth_range is not None or making.scale_shift is not None
    for row in (RESULTS[name] for name in making.formats):
        seen = making.intrinsics is not None or making.fov is not None
        if (row.needs == "metres" and not metric) or (row.needs == "depth" and not (metric or seen)):
            raise typer.BadParameter(
                f"{row.name} needs depth in metres: give --near and --far, or --scale and --shift."
                + (" (Or the camera alone, for a shape whose unit is unknown.)" if row.needs == "depth" else ""),
                param_hint="--format",
            )
        if row.intrinsics and not seen:
            raise typer.BadParameter(
                f"{row.name} needs the camera: give --fov, --camera, or --fx, --fy, --cx and --cy.",
                param_hint="--format",
            )


def _require_outputs(making: Making, manifest: Manifest) -> None:
    """That the model has what the formats and the options are about."""
    if manifest.decode.depth_kind is not None:
        return
    if making.depth_range or making.scale_shift:
        raise typer.BadParameter(f"{manifest.model} predicts normals alone: there is no depth to scale.")
    for name in making.formats:
        if RESULTS[name].outputs == ("depth",):
            raise typer.BadParameter(
                f"{name} is about depth, and {manifest.model} predicts normals alone.", param_hint="--format"
            )


def _choice(option: str, value: str, among: tuple[str, ...]) -> str:
    if value not in among:
        raise typer.BadParameter(f"There is no {value!r}; choose {', '.join(among)}.", param_hint=option)
    return value


def _device(device: str) -> None:
    from densegeo.runtime.backends import parse_device

    try:
        parse_device(device)
    except DensegeoError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


def _range(near: float | None, far: float | None) -> tuple[float, float] | None:
    pair = _together("near", near, "far", far)
    if pair is not None and not 0 < pair[0] < pair[1] < math.inf:
        raise typer.BadParameter("--near and --far must be metres with 0 < near < far.", param_hint="--near")
    return pair


def _line(scale: float | None, shift: float | None) -> tuple[float, float] | None:
    pair = _together("scale", scale, "shift", shift)
    if pair is not None and not (0 < pair[0] < math.inf and math.isfinite(pair[1])):
        raise typer.BadParameter("--scale must be a number above 0, and --shift a number.", param_hint="--scale")
    return pair


def _together(name_a: str, a: float | None, name_b: str, b: float | None) -> tuple[float, float] | None:
    """Two options that only make sense together."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise typer.BadParameter(f"--{name_a} and --{name_b} go together: give both or neither.")
    return a, b


def _intrinsics(
    fx: float | None, fy: float | None, cx: float | None, cy: float | None
) -> tuple[float, float, float, float] | None:
    if fx is None and fy is None and cx is None and cy is None:
        return None
    if fx is None or fy is None or cx is None or cy is None:
        raise typer.BadParameter("--fx, --fy, --cx and --cy go together: give all four or none.")
    if not (fx > 0 and fy > 0 and all(map(math.isfinite, (fx, fy, cx, cy)))):
        raise typer.BadParameter("must be finite, focal lengths above 0, in pixels.", param_hint="--fx")
    return fx, fy, cx, cy


def _camera(
    intrinsics: tuple[float, float, float, float] | None, fov: float | None, file: Path | None
) -> Camera | tuple[float, float, float, float] | None:
    from densegeo.runtime.camera import Camera

    if sum(given is not None for given in (intrinsics, fov, file)) > 1:
        raise typer.BadParameter("Give the camera once: --fov, --camera, or --fx, --fy, --cx and --cy.")
    if fov is not None and not 0 < fov < 180:
        raise typer.BadParameter("must be between 0 and 180 degrees.", param_hint="--fov")
    try:
        return intrinsics if file is None else Camera.read(file)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--camera") from error


def _listed(pair: tuple[float, ...] | None) -> list[float] | None:
    return None if pair is None else list(pair)
