"""`Geometry` -> the bytes of each format of `densegeo.formats`. Every file says its units, frame and depth kind.

An encoder gives a result's parts by file name; a part writes itself into a stream, a file or memory alike.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import one_of, require_flags, shown
from densegeo.errors import ConfigError
from densegeo.extras import install_hint
from densegeo.formats import RESULTS, SIDECAR, ResultFormat
from densegeo.runtime.camera import CameraLike
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.meshes import glb_part, ply_part
from densegeo.runtime.millimetres import MILLIMETRES_MAX
from densegeo.runtime.pictures import depth_picture, grey_picture, normals_picture, photograph
from densegeo.runtime.png import write_png

NORMALS_FRAME = "opencv (x right, y down, z forward; unit, towards the camera)"

DType = Literal["float32", "float16"]
Part = Callable[[BinaryIO], object]
Parts = dict[str, Part]


@dataclass(frozen=True)
class Extras:
    """What a caller may add to a result that is written.

    intrinsics: of the camera, for points and meshes. image: the one that the result is of, for their colours; color:
    the channel order of arrays. dtype: of the arrays in npy, npz and exr. source: what the image was and what made the
    result, as it stands in geometry.json. drop_flying: as in `Geometry.points`, for points and meshes.
    """

    intrinsics: CameraLike | None = None
    image: object = None
    color: str = "rgb"
    dtype: DType = "float32"
    source: Mapping[str, Any] | None = None
    drop_flying: bool = False

    def points(self, geometry: Geometry) -> NDArray[np.float32]:
        """(H, W, 3) of the result in the camera's frame; the format's row says that there are intrinsics."""
        assert self.intrinsics is not None
        return geometry.points(self.intrinsics, drop_flying=self.drop_flying)


@dataclass(frozen=True)
class Job:
    """A result to be written, with the text that goes into its files' headers."""

    geometry: Geometry
    extras: Extras
    metadata: dict[str, str] = field(default_factory=dict)

    def photograph(self) -> NDArray[np.uint8] | None:
        """(H, W, 3) RGB, or None when no image was given."""
        if self.extras.image is None:
            return None
        return photograph(self.geometry, self.extras.image, self.extras.color)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, those that there are, floats in the type asked for."""
        geometry = self.geometry
        arrays: dict[str, NDArray[Any]] = {} if geometry.prediction is None else {"prediction": geometry.prediction}
        arrays["valid"] = geometry.valid
        if geometry.has_depth:
            arrays["depth"] = geometry.depth
        if geometry.normals is not None:
            arrays["normals"] = geometry.normals
        with np.errstate(over="ignore"):  # beyond 65504 there is infinity in float16
            return {
                name: array if array.dtype == bool else array.astype(self.extras.dtype, copy=False)
                for name, array in arrays.items()
            }


def parts(geometry: Geometry, name: str, extras: Extras) -> Parts:
    """A format's parts by file name, checked to be possible. Raises ConfigError, NotMetricError, MissingOutputError."""
    row = _row(name, geometry, extras)
    return ENCODERS[name](Job(geometry, extras, metadata(geometry)), row)


def metadata(geometry: Geometry) -> dict[str, str]:
    """Units, frame, kind and provenance as text, for a file's header."""
    units = {"metric": "metres", "up_to_scale": "unknown (up to scale; the median is 1)", None: "none"}
    data = {
        "densegeo.model": geometry.model,
        "densegeo.depth_kind": geometry.depth_kind or "none",
        "densegeo.depth_units": units.get(geometry.depth_kind, "none (not metric)"),
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
    return "z-depth along the optical axis" if geometry.has_depth else "prediction in the network's space"


def _row(name: str, geometry: Geometry, extras: Extras) -> ResultFormat:
    if not isinstance(name, str) or name not in RESULTS:
        raise ConfigError(f"There is no format {name!r}; choose from {', '.join(RESULTS)}.")
    one_of("dtype", extras.dtype, ("float32", "float16"))
    require_flags(drop_flying=extras.drop_flying)
    _require_json(extras.source)
    row = RESULTS[name]
    if row.outputs == ("depth",):
        geometry.require_prediction(f"{name} file")
    if row.needs != "nothing":
        geometry.require_depth(f"{name} file", metres=row.needs == "metres")
    if row.intrinsics:
        if extras.intrinsics is None:
            raise ConfigError(f"{name} needs the camera: pass intrinsics=(fx, fy, cx, cy) or a 3x3 matrix, in pixels.")
        extras.points(geometry)
    if row.module:
        try:
            import_module(row.module)
        except ImportError as error:
            raise ConfigError(f"{name} needs {row.module}. Install it: {install_hint(row.extra)}.") from error
    return row


def _require_json(source: object) -> None:
    if source is None:
        return
    if not isinstance(source, Mapping):
        raise ConfigError(f"source must be a mapping that JSON can hold, or None, not {shown(source)}.")
    try:
        json.dumps(dict(source), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"source must be what JSON can hold, not {shown(source)}: {error}.") from error


def _npy(job: Job, row: ResultFormat) -> Parts:
    files = {f"{name}.npy": _array(array) for name, array in job.arrays().items()}
    return files | _json(job, row)


def _array(array: NDArray[Any]) -> Part:
    return lambda stream: np.save(stream, array, allow_pickle=False)


def _npz(job: Job, row: ResultFormat) -> Parts:
    """Not compressed: floats hardly shrink, and it would take most of the time. geometry: the text of geometry.json."""
    arrays: dict[str, Any] = {**job.arrays(), "geometry": np.array(sidecar(job))}
    return {name: lambda stream: np.savez(stream, **arrays) for name in row.files}


def _json(job: Job, row: ResultFormat) -> Parts:
    # made when it is written, after all else: `source` may grow by what the others warn of
    return {SIDECAR: lambda stream: stream.write(sidecar(job).encode() + b"\n")}


def sidecar(job: Job) -> str:
    """JSON of all that the arrays do not say themselves."""
    geometry, fields = job.geometry, {key.removeprefix("densegeo."): value for key, value in job.metadata.items()}
    height, width = geometry.valid.shape
    arrays = {f"{name}.npy": [str(array.dtype), *array.shape] for name, array in job.arrays().items()}
    record = {
        **fields,
        "source_size": list(geometry.source_size),
        "size": [width, height],
        "calibration": _calibration(geometry),
        "timings_ms": {stage: round(ms, 3) for stage, ms in geometry.timings.items()},
        "arrays": arrays,
        "source": None if job.extras.source is None else dict(job.extras.source),
    }
    return json.dumps(record, indent=2, allow_nan=False)


def _calibration(geometry: Geometry) -> dict[str, Any] | None:
    if geometry.calibration is None:
        return None
    return {key: _finite(value) for key, value in asdict(geometry.calibration).items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None."""
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _png(job: Job, row: ResultFormat) -> Parts:
    geometry, files = job.geometry, {}
    if geometry.prediction is not None:
        look = {"densegeo.picture": "near warm, far cool; for looking at, not for measuring"}
        files["depth_color.png"] = _picture(lambda: depth_picture(geometry), job.metadata | look)
    if geometry.normals is not None:
        frame = {"densegeo.normals_frame": "opengl (x right, y up, z to the viewer), RGB = (n + 1) / 2"}
        normals = geometry.normals
        files["normals.png"] = _picture(lambda: normals_picture(normals), job.metadata | frame)
    return files


def _grey(bits: int) -> Callable[[Job, ResultFormat], Parts]:
    def encode(job: Job, row: ResultFormat) -> Parts:
        picture, meaning = grey_picture(job.geometry, bits)
        return {name: _picture(lambda: picture, job.metadata | meaning) for name in row.files}

    return encode


def _png16(job: Job, row: ResultFormat) -> Parts:
    units = {"densegeo.depth_units": f"millimetres (REP 118), 0 = invalid or beyond {MILLIMETRES_MAX / 1000} m"}
    return {name: _picture(job.geometry.millimetres, job.metadata | units) for name in row.files}


def _picture(picture: Callable[[], NDArray[Any]], meta: dict[str, str]) -> Part:
    def write(stream: BinaryIO) -> None:
        write_png(stream, picture(), meta)

    return write


def _ply(job: Job, row: ResultFormat) -> Parts:
    part = ply_part(job.geometry, job.extras.points(job.geometry), job.photograph(), job.metadata)
    return dict.fromkeys(row.files, part)


def _glb(job: Job, row: ResultFormat) -> Parts:
    picture = job.photograph()
    texture = depth_picture(job.geometry) if picture is None else picture
    part = glb_part(job.geometry, job.extras.points(job.geometry), texture, job.metadata)
    return dict.fromkeys(row.files, part)


def _exr(job: Job, row: ResultFormat) -> Parts:
    """One picture a file, grey (Y) or x, y, z as R, G, B: the only channels that OpenCV reads (it makes Z black)."""
    arrays, files = job.arrays(), {}
    if job.geometry.prediction is not None:
        name = "depth" if job.geometry.has_depth else "prediction"
        files[f"{name}.exr"] = _exr_picture({"Y": arrays[name]}, job.metadata)
    if (normals := arrays.get("normals")) is not None:
        channels = {name: normals[..., axis] for axis, name in enumerate("RGB")}
        files["normals.exr"] = _exr_picture(channels, job.metadata)
    return files


def _exr_picture(channels: dict[str, NDArray[Any]], meta: dict[str, str]) -> Part:
    def write(stream: BinaryIO) -> None:
        exr: Any = import_module("OpenEXR")
        header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage, **meta}
        data = {name: np.ascontiguousarray(channel) for name, channel in channels.items()}
        with tempfile.TemporaryDirectory() as folder:  # the library writes to paths alone
            path = Path(folder) / "picture.exr"
            try:
                exr.File(header, data).write(str(path))
            except OSError:
                raise
            except Exception as error:  # OpenEXR reports write failures as its own exceptions
                raise OSError(str(error)) from error
            stream.write(path.read_bytes())

    return write


ENCODERS: Mapping[str, Callable[[Job, ResultFormat], Parts]] = {
    "npy": _npy,
    "npz": _npz,
    "json": _json,
    "png": _png,
    "grey8": _grey(8),
    "grey16": _grey(16),
    "png16": _png16,
    "ply": _ply,
    "glb": _glb,
    "exr": _exr,
}
