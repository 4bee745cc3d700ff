"""The options of `densegeo infer`: each checked before the bundle is opened, in the command line's own words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from densegeo.backends import installed
from densegeo.errors import ConfigError
from densegeo.extras import install_hint
from densegeo.formats import FILM_EXTRA, FILM_MODULE, RESULTS

if TYPE_CHECKING:
    from densegeo.fleet.ray_inference import RayOptions
    from densegeo.inference import Making
    from densegeo.inputs import FoundInputs
    from densegeo.runtime.bundle import Manifest
    from densegeo.runtime.camera import Camera


# What errors and warnings advise, in Python's words -> the options that do the same.
_ADVICE = (
    (r"value_range=\(([^,()]+), ([^,()]+)\)", r"--value-range \1 \2"),
    (r"Give \w+ anchors or more(, or near and far)?", "Give --near and --far"),
    (
        r"(image file is truncated.*)\. Copy or download it again\.",
        r"\1. Copy or download it again, or take a JPEG without its end with --truncated.",
    ),
)


def in_options(text: str) -> str:
    """An error or a warning, its advice in the command line's words."""
    for pattern, option in _ADVICE:
        text = re.sub(pattern, option, text)
    return text


def inputs_of(arguments: list[str], list_file: str | None, output: Path, making: Making) -> FoundInputs:
    """What there is to work on."""
    from densegeo.errors import ImageError
    from densegeo.inputs import find_inputs, read_list

    try:
        stated_paths = [argument for argument in arguments if argument != "-"]
        listed = [path for name in arguments if name == "-" for path in read_list(name)]
        if list_file is not None:
            listed += read_list(list_file)
        if not stated_paths and not listed:
            raise ImageError("There is nothing to work on: name images or folders, or a list with --list.")
        found_inputs = find_inputs(stated_paths, output, listed)
    except ImageError as error:
        raise typer.BadParameter(str(error), param_hint="INPUTS") from error
    if any(item.film for item in found_inputs.inputs) and not installed(FILM_MODULE):
        hint = f"Films and cameras need {FILM_MODULE}: {install_hint(FILM_EXTRA)}."
        raise typer.BadParameter(hint, param_hint="INPUTS")
    if all(item.film for item in found_inputs.inputs) and (making.value_range or making.truncated):
        option = "--value-range" if making.value_range else "--truncated"
        raise typer.BadParameter("is about images; films and cameras need it not.", param_hint=option)
    return found_inputs


def ray_of(
    address: str | None,
    actors: int | None,
    cpus: int | None,
    into: str | None,
    *,
    device: str,
    overwrite: bool,
    of_films: Mapping[str, object],
) -> RayOptions | None:
    """How to run on Ray; None without it. of_films: options that are about films, and what they were given."""
    if address is None:
        for option, value in (("--actors", actors), ("--actor-cpus", cpus), ("--into", into)):
            if value is not None:
                raise typer.BadParameter("goes with --ray.", param_hint=option)
        return None
    require_ray(address, device, cpus or 1, "actor", "pyarrow")
    from densegeo.fleet.ray_inference import INTO, TREE, RayOptions

    for option, film_value in of_films.items():
        if film_value:
            raise typer.BadParameter("is about films and cameras, which run without --ray.", param_hint=option)
    chosen = choice("--into", into or TREE, INTO)
    if chosen != TREE and overwrite:
        hint = f"is for trees; for {chosen} choose another folder, or go on with --skip-existing."
        raise typer.BadParameter(hint, param_hint="--overwrite")
    return RayOptions(address, actors, cpus or 1, chosen)


def require_ray(address: str, device: str, cpus: int, process: str, *modules: str) -> None:
    """What can be said of --ray before anything is started. process: its name, see `ray_cluster.share`.

    modules: what is needed beside Ray.
    """
    for module in ("ray", *modules):
        if not installed(module):
            raise typer.BadParameter(f"Ray needs {module}: {install_hint('ray')}.", param_hint="--ray")
    from densegeo.fleet.ray_cluster import require_here, require_reachable

    if not address.strip():
        raise typer.BadParameter("say local, auto, or the address of a cluster.", param_hint="--ray")
    try:
        require_reachable(address)
        require_here(address, device, cpus, process)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--ray") from error


def formats_of(text: str) -> tuple[str, ...]:
    """Names of formats that can be written here."""
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
            hint = f"{name} needs {row.module}: {install_hint(row.extra)}."
            raise typer.BadParameter(hint, param_hint="--format")
    return names


def require_what_formats_need(making: Making) -> None:
    """Metres, said once, and the camera, where the formats have them."""
    if making.depth_range and making.scale_shift:
        raise typer.BadParameter("Give either --near and --far or --scale and --shift, not both.")
    metric = making.depth_range is not None or making.scale_shift is not None
    for row in (RESULTS[name] for name in making.formats):
        has_camera = making.intrinsics is not None or making.fov is not None
        if (row.needs == "metres" and not metric) or (row.needs == "depth" and not (metric or has_camera)):
            raise typer.BadParameter(
                f"{row.name} needs depth in metres: give --near and --far, or --scale and --shift."
                + (" (Or the camera alone, for a shape whose unit is unknown.)" if row.needs == "depth" else ""),
                param_hint="--format",
            )
        if row.intrinsics and not has_camera:
            raise typer.BadParameter(
                f"{row.name} needs the camera: give --fov, --camera, or --fx, --fy, --cx and --cy.",
                param_hint="--format",
            )
    if making.drop_flying and not any(RESULTS[name].needs == "depth" for name in making.formats):
        shapes = " or ".join(name for name, row in RESULTS.items() if row.needs == "depth")
        raise typer.BadParameter(f"is about {shapes}: add --format.", param_hint="--drop-flying")


def require_outputs(making: Making, manifest: Manifest) -> None:
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


def choice(option: str, value: str, among: tuple[str, ...]) -> str:
    """One of a few words."""
    if value not in among:
        raise typer.BadParameter(f"There is no {value!r}; choose {', '.join(among)}.", param_hint=option)
    return value


def depth_range(near: float | None, far: float | None) -> tuple[float, float] | None:
    """Metres, near and far."""
    pair = _together("near", near, "far", far)
    if pair is not None and not 0 < pair[0] < pair[1] < math.inf:
        raise typer.BadParameter("--near and --far must be metres with 0 < near < far.", param_hint="--near")
    return pair


def scale_shift(scale: float | None, shift: float | None) -> tuple[float, float] | None:
    """The line of the depth."""
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


def camera_of(
    fx: float | None, fy: float | None, cx: float | None, cy: float | None, fov: float | None, file: Path | None
) -> Camera | tuple[float, float, float, float] | None:
    """The camera; None also where `fov` says it."""
    from densegeo.runtime.camera import Camera

    intrinsics = _intrinsics(fx, fy, cx, cy)
    if sum(source is not None for source in (intrinsics, fov, file)) > 1:
        raise typer.BadParameter("Give the camera once: --fov, --camera, or --fx, --fy, --cx and --cy.")
    if fov is not None and not 0 < fov < 180:
        raise typer.BadParameter("must be between 0 and 180 degrees.", param_hint="--fov")
    try:
        return intrinsics if file is None else Camera.read(file)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--camera") from error


def value_range(pair: tuple[float, float] | None) -> tuple[float, float] | None:
    """The values of black and white in images."""
    from densegeo.runtime.levels import check_range

    try:
        check_range(pair)
    except ConfigError as error:
        hint = "must be two numbers, the smaller one first, such as 0 4095 for images of 12 bits."
        raise typer.BadParameter(hint, param_hint="--value-range") from error
    return pair
