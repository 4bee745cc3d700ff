"""`Geometry` -> files and pictures. Every file says its units, frame and depth kind.

Files are first written under temporary names and renamed together at the end: a failure leaves none of them.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from densegeo.errors import ConfigError, ResourceError
from densegeo.runtime.colormap import colorize
from densegeo.runtime.geometry import Geometry

NORMALS_FRAME = "opencv (x right, y down, z forward; unit, towards the camera)"
MILLIMETRES_MAX = 65535


@dataclass(frozen=True)
class Job:
    """What a writer needs: the result, the intrinsics if given, and the metadata for its file."""

    geometry: Geometry
    intrinsics: ArrayLike | None
    metadata: dict[str, str]


@dataclass(frozen=True)
class Format:
    """One row of `FORMATS`: what it needs and its files, as (name, writer); a writer gets the temporary path."""

    metric: bool
    intrinsics: bool
    library: str  # a module of an extra, or empty
    files: Callable[[Job], list[tuple[str, Callable[[Path], None]]]]


def save(
    geometry: Geometry, directory: Path, formats: Sequence[str], stem: str, intrinsics: ArrayLike | None
) -> list[Path]:
    """Write all formats or nothing; the paths written, in order.

    Raises ConfigError (unknown format, missing intrinsics or extra), NotMetricError, ResourceError.
    """
    if isinstance(formats, str):
        formats = (formats,)
    if os.path.basename(stem) != stem:
        raise ConfigError(f"stem must be a plain name without folders, not {stem!r}.")
    job = Job(geometry, intrinsics, metadata(geometry))
    planned: list[tuple[Path, Callable[[Path], None]]] = []
    for name in dict.fromkeys(formats):
        for file, write in _checked(name, job).files(job):
            planned.append((directory / (f"{stem}_{file}" if stem else file), write))
    _write_together(directory, planned)
    return [path for path, _ in planned]


def metadata(geometry: Geometry) -> dict[str, str]:
    """Units, frame, kind and provenance as text, for a file's header."""
    metric = geometry.depth_kind == "metric"
    data = {
        "densegeo.model": geometry.model,
        "densegeo.depth_kind": geometry.depth_kind or "none",
        "densegeo.depth_units": "metres" if metric else "none (not metric)" if geometry.depth_kind else "none",
        "densegeo.depth_meaning": _meaning(geometry),
        "densegeo.normals_frame": NORMALS_FRAME if geometry.normals is not None else "none",
        "densegeo.source_size": f"{geometry.source_size[0]}x{geometry.source_size[1]}",
    }
    if geometry.calibration is not None:
        data["densegeo.calibration"] = json.dumps(_calibration(geometry))
    return data


def _meaning(geometry: Geometry) -> str:
    if geometry.prediction is None:
        return "none"
    metric = geometry.depth_kind == "metric"
    return "z-depth along the optical axis" if metric else "prediction in the network's space"


def depth_picture(geometry: Geometry) -> NDArray[np.uint8]:
    """(H, W, 3) sRGB of the depth, near warm, far cool, whatever its kind; metric depth on a log scale.

    Raises MissingOutputError.
    """
    prediction, valid = geometry.require_prediction("picture of the depth"), geometry.valid
    if geometry.depth_kind == "metric":
        with np.errstate(invalid="ignore"):
            farness = np.log(geometry.depth)
        valid = np.isfinite(farness)
    elif geometry.depth_kind == "disparity_affine":
        farness = -prediction
    else:
        farness = prediction
    return colorize(farness, valid)


def normals_picture(normals: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(H, W, 3) OpenGL-frame normals -> RGB = (n + 1) / 2."""
    known = np.nan_to_num(normals, nan=-1.0)  # black where there is none
    return np.asarray(np.clip(np.round((known + 1) * 127.5), 0, 255), dtype=np.uint8)


def side_by_side(geometry: Geometry, image: object = None) -> Image.Image:
    """Optional source image, depth, normals, as far as there are, left to right, each at the source's size."""
    tiles: list[NDArray[Any]] = []
    if image is not None:
        from densegeo.runtime.images import load_image

        frame = load_image(image)
        if frame.size != geometry.source_size:
            raise ConfigError(f"The image is {frame.size}, the result is of {geometry.source_size} (width, height).")
        pixels = frame.pixels
        tiles.append(pixels if pixels.dtype == np.uint8 else np.round(255 * pixels).astype(np.uint8))
    if geometry.prediction is not None:
        tiles.append(depth_picture(geometry))
    normals = geometry.normals_in("opengl")
    if normals is not None:
        tiles.append(normals_picture(normals))
    return Image.fromarray(np.concatenate(tiles, axis=1))


def _checked(name: str, job: Job) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"There is no format {name!r}; choose from {', '.join(FORMATS)}.")
    row = FORMATS[name]
    if row.metric:
        job.geometry._require_metric(f"{name} file")
    if row.intrinsics:
        if job.intrinsics is None:
            raise ConfigError(f"{name} needs the camera: pass intrinsics=(fx, fy, cx, cy) or a 3x3 matrix, in pixels.")
        job.geometry.points(job.intrinsics)
    if row.library:
        try:
            import_module(row.library)
        except ImportError as error:
            raise ConfigError(f"{name} needs {row.library}. Install it: pip install densegeo[{name}].") from error
    return row


def _write_together(directory: Path, planned: list[tuple[Path, Callable[[Path], None]]]) -> None:
    staged: list[tuple[Path, Path]] = []
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for final, write in planned:
            # the suffix stays last: some writers choose by it
            staged.append((final.with_name(f".{secrets.token_hex(6)}.{final.name}"), final))
            write(staged[-1][0])
        for temporary, final in staged:
            os.replace(temporary, final)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        for temporary, _ in staged:
            _quietly(temporary.unlink)
        for folder in made:
            _quietly(folder.rmdir)
        if isinstance(error, OSError):
            raise ResourceError(
                f"The results cannot be written to {directory}: {error.strerror or error}. "
                "Nothing was left there; free space or choose another folder."
            ) from error
        raise


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError:
        return


def _npy_files(job: Job) -> list[tuple[str, Callable[[Path], None]]]:
    geometry = job.geometry
    arrays: dict[str, NDArray[Any]] = {} if geometry.prediction is None else {"prediction": geometry.prediction}
    arrays["valid"] = geometry.valid
    if geometry.depth_kind == "metric":
        arrays["depth"] = geometry.depth
    if geometry.normals is not None:
        arrays["normals"] = geometry.normals
    sidecar = json.dumps(
        {
            **{key.removeprefix("densegeo."): value for key, value in job.metadata.items()},
            "source_size": list(geometry.source_size),
            "calibration": _calibration(geometry),
            "timings_ms": {stage: round(ms, 3) for stage, ms in geometry.timings.items()},
            "arrays": {f"{name}.npy": [str(array.dtype), *array.shape] for name, array in arrays.items()},
        },
        indent=2,
    )

    def array_writer(array: NDArray[Any]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            with open(path, "wb") as file:  # np.save on a path hides the cause of a failed write
                np.save(file, array, allow_pickle=False)

        return write

    files = [(f"{name}.npy", array_writer(array)) for name, array in arrays.items()]
    return [*files, ("geometry.json", lambda path: _write_bytes(path, sidecar.encode() + b"\n"))]


def _calibration(geometry: Geometry) -> dict[str, Any] | None:
    if geometry.calibration is None:
        return None
    record = asdict(geometry.calibration)
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _png(picture: Callable[[], NDArray[Any]], meta: dict[str, str]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        info = PngInfo()
        for key, value in meta.items():
            info.add_text(key, value)
        with open(path, "wb") as file:
            Image.fromarray(picture()).save(file, format="PNG", pnginfo=info)

    return write


def _png_files(job: Job) -> list[tuple[str, Callable[[Path], None]]]:
    geometry, picture = job.geometry, {"densegeo.picture": "near warm, far cool; for looking at, not for measuring"}
    files: list[tuple[str, Callable[[Path], None]]] = []
    if geometry.prediction is not None:
        files.append(("depth_color.png", _png(lambda: depth_picture(geometry), {**job.metadata, **picture})))
    normals = geometry.normals_in("opengl")
    if normals is not None:
        meta = {**job.metadata, "densegeo.normals_frame": "opengl (x right, y up, z to the viewer), RGB = (n + 1) / 2"}
        files.append(("normals.png", _png(lambda: normals_picture(normals), meta)))
    return files


def _png16_files(job: Job) -> list[tuple[str, Callable[[Path], None]]]:
    # REP 118: unsigned 16-bit millimetres, 0 = invalid; what 16 bits cannot hold is invalid too
    millimetres = np.round(np.nan_to_num(job.geometry.depth.astype(np.float64), nan=0.0) * 1000)
    values = np.where(millimetres <= MILLIMETRES_MAX, millimetres, 0).astype(np.uint16)
    meta = {**job.metadata, "densegeo.depth_units": "millimetres (REP 118), 0 = invalid or beyond 65.535 m"}
    return [("depth_mm.png", _png(lambda: values, meta))]


def _ply_files(job: Job) -> list[tuple[str, Callable[[Path], None]]]:
    geometry = job.geometry
    assert job.intrinsics is not None
    points = geometry.points(job.intrinsics)
    kept = np.isfinite(points).all(axis=-1)
    columns, names = [points[kept]], ["x", "y", "z"]
    if geometry.normals is not None:
        columns.append(geometry.normals[kept])
        names += ["nx", "ny", "nz"]
    vertices = np.concatenate(columns, axis=1).astype("<f4")
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += ["comment units metres", "comment frame opencv (x right, y down, z forward)"]
    lines += [f"comment {key} {value}" for key, value in job.metadata.items()]
    lines += [f"element vertex {len(vertices)}", *(f"property float {name}" for name in names), "end_header"]
    header = ("\n".join(lines) + "\n").encode("ascii", "replace")
    return [("points.ply", lambda path: _write_bytes(path, header + vertices.tobytes()))]


def _exr_files(job: Job) -> list[tuple[str, Callable[[Path], None]]]:
    geometry = job.geometry
    channels = {} if geometry.prediction is None else {"prediction": geometry.prediction}
    if geometry.depth_kind == "metric":
        channels["Z"] = geometry.depth
    if geometry.normals is not None:
        channels |= {f"N.{axis}": geometry.normals[..., index] for index, axis in enumerate("XYZ")}

    def write(path: Path) -> None:
        exr: Any = import_module("OpenEXR")
        header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage, **job.metadata}
        data = {name: np.ascontiguousarray(channel, dtype=np.float32) for name, channel in channels.items()}
        try:
            exr.File(header, data).write(str(path))
        except OSError:
            raise
        except Exception as error:  # OpenEXR reports write failures as its own exceptions
            raise OSError(str(error)) from error

    return [("geometry.exr", write)]


FORMATS = {
    "npy": Format(metric=False, intrinsics=False, library="", files=_npy_files),
    "png": Format(metric=False, intrinsics=False, library="", files=_png_files),
    "png16": Format(metric=True, intrinsics=False, library="", files=_png16_files),
    "ply": Format(metric=True, intrinsics=True, library="", files=_ply_files),
    "exr": Format(metric=False, intrinsics=False, library="OpenEXR", files=_exr_files),
}
