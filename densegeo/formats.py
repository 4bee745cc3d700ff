"""What results are written as, and what images are read from: one row a format.

`--help`, early checks and names of files follow from the rows. How a row's bytes are made stands in `runtime.encoders`.
Imports neither numpy nor Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ResultFormat:
    """One format.

    files: file name, which follows the stem -> media type; a result has those that its model has the output for.
    needs: what `geometry.depth` must be for it: nothing, a depth of any unit, or metres. intrinsics: whether it needs
    the camera. module, extra: the library that writes it, and the extra that brings it.
    """

    name: str
    about: str
    files: Mapping[str, str]
    needs: Literal["nothing", "depth", "metres"] = "nothing"
    outputs: tuple[str, ...] = field(default=("depth", "normals"))  # any of them is enough
    intrinsics: bool = False
    module: str = ""
    extra: str = ""


_NPY, _PNG, _EXR = "application/x-npy", "image/png", "image/x-exr"
SIDECAR = "geometry.json"
RESULTS: Mapping[str, ResultFormat] = {
    row.name: row
    for row in (
        ResultFormat(
            name="npy",
            about="arrays as they are, and geometry.json",
            files={f"{name}.npy": _NPY for name in ("prediction", "valid", "depth", "normals")}
            | {SIDECAR: "application/json"},
        ),
        ResultFormat(name="npz", about="the same in one file", files={"geometry.npz": "application/x-npz"}),
        ResultFormat(
            name="json", about="kind, units, frame, source and calibration", files={SIDECAR: "application/json"}
        ),
        ResultFormat(
            name="png",
            about="depth and normals in colour, to look at",
            files={"depth_color.png": _PNG, "normals.png": _PNG},
        ),
        ResultFormat(
            name="grey8",
            about="depth of any kind in grey, near bright, 0 invalid; its range is in the file",
            files={"depth_grey8.png": _PNG},
            outputs=("depth",),
        ),
        ResultFormat(
            name="grey16",
            about="the same with 16 bits",
            files={"depth_grey16.png": _PNG},
            outputs=("depth",),
        ),
        ResultFormat(
            name="png16",
            about="millimetres with 16 bits, 0 invalid",
            files={"depth_mm.png": _PNG},
            needs="metres",
            outputs=("depth",),
        ),
        ResultFormat(
            name="ply",
            about="points with normals, and colours where the image is given",
            files={"points.ply": "application/x-ply"},
            needs="depth",
            outputs=("depth",),
            intrinsics=True,
        ),
        ResultFormat(
            name="glb",
            about="a textured mesh, cut at depth steps",
            files={"mesh.glb": "model/gltf-binary"},
            needs="depth",
            outputs=("depth",),
            intrinsics=True,
        ),
        ResultFormat(
            name="exr",
            about="float pictures, grey depth and normals as red, green, blue; OpenCV reads them",
            files={"prediction.exr": _EXR, "depth.exr": _EXR, "normals.exr": _EXR},
            module="OpenEXR",
            extra="exr",
        ),
    )
}


@dataclass(frozen=True)
class ImageFormat:
    """What images are read from. name: Pillow's. module, extra: what reads it where Pillow alone does not."""

    name: str
    suffixes: tuple[str, ...]
    module: str = ""
    extra: str = ""


# An explicit list keeps plugins of Pillow that start programs (EPS) or read URLs out.
IMAGES = (
    ImageFormat("PNG", (".png", ".apng")),
    ImageFormat("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")),
    ImageFormat("WEBP", (".webp",)),
    ImageFormat("TIFF", (".tif", ".tiff")),
    ImageFormat("BMP", (".bmp", ".dib")),
    ImageFormat("PPM", (".ppm", ".pgm", ".pbm", ".pnm")),
    ImageFormat("GIF", (".gif",)),
    ImageFormat("JPEG2000", (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc")),
    ImageFormat("AVIF", (".avif",)),
    ImageFormat("HEIF", (".heic", ".heif", ".hif"), module="pillow_heif", extra="heic"),
)
IMAGE_SUFFIXES: Mapping[str, ImageFormat] = {suffix: row for row in IMAGES for suffix in row.suffixes}
FILM_SUFFIXES = frozenset(
    {".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"}
)
FILM_MODULE, FILM_EXTRA = "av", "video"
SIDE_BY_SIDE = "side_by_side.mp4"  # what a film becomes
# What results' names end in: such files are not taken for images.
RESULT_ENDINGS = (*(file for row in RESULTS.values() for file in row.files), SIDE_BY_SIDE)
