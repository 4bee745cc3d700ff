"""`densegeo infer`, the command: its options, all checked before the bundle is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from densegeo import infer_options as checked
from densegeo.arguments import Backend, Bundle, Device, Number, Ray, Whole
from densegeo.formats import RESULTS


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
    value_range: Annotated[
        Optional[tuple[float, float]],  # noqa: UP045
        typer.Option(metavar="BLACK WHITE", help="Values of black and white: 0 4095 for 12 bits in files of 16."),
    ] = None,
    truncated: Annotated[
        bool, typer.Option("--truncated", help="Take JPEGs without their last bytes; what is missing is grey.")
    ] = False,
    drop_flying: Annotated[
        bool, typer.Option("--drop-flying", help="Leave pixels in the air between two surfaces out of ply and glb.")
    ] = False,
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
    ray: Ray = None,
    actors: Annotated[Whole, typer.Option(min=1, help="Of Ray; by default one a GPU, else as many as fit.")] = None,
    actor_cpus: Annotated[Whole, typer.Option(min=1, help="CPUs of each actor; by default 1.")] = None,
    into: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --ray, what results are put into: tree (as without), parquet or webdataset."),
    ] = None,
    backend: Backend = "auto",
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary; errors alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
) -> None:
    """Depth and normals of images, films and cameras, saved to a folder that mirrors the images' folders.

    Ends with 0 when all was done, 1 when something failed, 2 for wrong options, 130 after Ctrl-C, 143
    after SIGTERM, and 129 when the terminal went away (SIGHUP).
    """
    from densegeo.infer_run import Run, run
    from densegeo.inference import Making

    making = Making(
        formats=checked.formats_of(formats),
        depth_range=checked.depth_range(near, far),
        scale_shift=checked.scale_shift(scale, shift),
        intrinsics=checked.camera_of(fx, fy, cx, cy, fov, camera),
        fov=fov,
        dtype=checked.choice("--dtype", dtype, ("float32", "float16")),
        value_range=checked.value_range(value_range),
        truncated=truncated,
        drop_flying=drop_flying,
    )
    checked.require_what_formats_need(making)
    if skip_existing and overwrite:
        raise typer.BadParameter("Give either --skip-existing or --overwrite, not both.")
    checked.choice("--fit", fit, ("stretch", "pad"))
    checked.choice("--preprocessing", preprocessing, ("densegeo", "authors"))
    if preprocessing == "authors" and fit == "pad":
        raise typer.BadParameter("--preprocessing authors stretches: leave --fit pad out.", param_hint="--fit")
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; name a folder.", param_hint="--output")
    checked.choice("--resolution", resolution, ("image", "network"))
    options: dict[str, Any] = {"backend": backend, "device": device, "fit": fit, "preprocessing": preprocessing}
    options |= {"threads": threads, "resolution": resolution}
    of_films = {"--frames": frames, "--max-frames": max_frames}
    fleet = checked.ray_of(ray, actors, actor_cpus, into, device=device, overwrite=overwrite, of_films=of_films)
    job = Run(bundle, output, options, workers, skip_existing, overwrite, quiet, as_json, frames, max_frames, fleet)
    found_inputs = checked.inputs_of(inputs or [], list_file, output, making)
    if fleet is not None and any(item.film for item in found_inputs.inputs):
        raise typer.BadParameter("is about images: run films and cameras without it.", param_hint="--ray")
    code = run(job, making, found_inputs)
    if code:
        raise typer.Exit(code)
