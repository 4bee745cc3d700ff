"""Points as PLY and a mesh as binary glTF (glTF 2.0, section 4: GLB), written with numpy alone."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densegeo.errors import ConfigError
from densegeo.outputs import FRAMES
from densegeo.runtime.decode import turned
from densegeo.runtime.geometry import Geometry

DEPTH_STEP = 1.04  # pixels whose depths differ by more than this factor are not joined by a triangle
_FLOAT, _UINT32, _VERTICES, _INDICES = 5126, 5125, 34962, 34963  # glTF's numbers for types and buffers


def ply_part(
    geometry: Geometry, points: NDArray[np.float32], colours: NDArray[np.uint8] | None, metadata: dict[str, str]
) -> Callable[[BinaryIO], object]:
    """Binary little-endian points of the OpenCV frame. points: (H, W, 3), NaN where there is none. colours: (H, W, 3)
    RGB of the image, or None for none.
    """
    finite = np.isfinite(points[..., 2])
    columns: list[tuple[str, str, NDArray[Any]]] = [(name, "<f4", points[..., i]) for i, name in enumerate("xyz")]
    if geometry.normals is not None:
        columns += [(name, "<f4", geometry.normals[..., i]) for i, name in enumerate(("nx", "ny", "nz"))]
    if colours is not None:
        columns += [(name, "u1", colours[..., i]) for i, name in enumerate(("red", "green", "blue"))]
    vertices = np.empty(int(finite.sum()), dtype=[(name, kind) for name, kind, _ in columns])
    for name, _, values in columns:
        vertices[name] = values[finite]
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment units {metadata['densegeo.depth_units']}"]
    lines += ["comment frame opencv (x right, y down, z forward)"]
    lines += [f"comment {key} {value}" for key, value in metadata.items()]
    types = {"<f4": "float", "u1": "uchar"}
    lines += [f"element vertex {len(vertices)}"]
    lines += [*(f"property {types[kind]} {name}" for name, kind, _ in columns), "end_header"]
    header = ("\n".join(lines) + "\n").encode("ascii", "replace")

    def write(stream: BinaryIO) -> None:
        stream.write(header)
        stream.write(vertices.tobytes())

    return write


def glb_part(
    geometry: Geometry, points: NDArray[np.float32], texture: NDArray[np.uint8], metadata: dict[str, str]
) -> Callable[[BinaryIO], object]:
    """A mesh over the pixels in glTF's axes (x right, y up, z to the viewer), with a picture (h, w, 3) as its texture.

    points: (H, W, 3) in the OpenCV frame, NaN where there is none. Neighbours whose depths differ by more than
    `DEPTH_STEP` are not joined. Raises ConfigError where nothing is left.
    """
    faces = grid_faces(points[..., 2])
    if not len(faces):
        raise ConfigError("There is no surface to make a mesh of: no four neighbouring pixels have a depth.")
    used, faces = _compact(faces, points.shape[0] * points.shape[1])
    rows, columns = np.divmod(used, points.shape[1])
    arrays = {"POSITION": _turned(points.reshape(-1, 3)[used])}
    if geometry.normals is not None:
        arrays["NORMAL"] = _turned(geometry.normals.reshape(-1, 3)[used])
    height, width = geometry.valid.shape
    corner = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=1).astype("<f4")
    picture = io.BytesIO()
    Image.fromarray(texture).save(picture, format="JPEG", quality=92)
    return _glb(arrays | {"TEXCOORD_0": corner}, faces, picture.getvalue(), metadata)


def grid_faces(depth: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Two triangles (indices into the flattened (H, W), anticlockwise for the camera) for each 2x2 pixels that have a
    depth and belong together: (N, 3).
    """
    corners = np.stack([depth[:-1, :-1], depth[1:, :-1], depth[1:, 1:], depth[:-1, 1:]])
    with np.errstate(invalid="ignore"):
        joined = corners.max(axis=0) <= DEPTH_STEP * corners.min(axis=0)  # False where one is NaN
    rows, columns = np.nonzero(joined)
    first = (rows * depth.shape[1] + columns).astype(np.uint32)
    right, below = np.uint32(1), np.uint32(depth.shape[1])
    quads = np.stack([first, first + below, first + below + right, first, first + below + right, first + right], axis=1)
    return quads.reshape(-1, 3)


def _turned(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return turned(vectors, FRAMES["opengl"]).astype("<f4", copy=False)


def _compact(faces: NDArray[np.uint32], count: int) -> tuple[NDArray[np.intp], NDArray[np.uint32]]:
    """The vertices that are used, and the faces in their numbers."""
    present = np.zeros(count, dtype=bool)
    present[faces.ravel()] = True
    numbers = np.cumsum(present, dtype=np.uint32) - np.uint32(1)
    return np.flatnonzero(present), numbers[faces]


def _glb(
    arrays: dict[str, NDArray[np.float32]], faces: NDArray[np.uint32], picture: bytes, metadata: dict[str, str]
) -> Callable[[BinaryIO], object]:
    kinds = {2: "VEC2", 3: "VEC3"}
    chunks: list[Any] = [faces.astype("<u4", copy=False), *arrays.values(), picture + b"\0" * (-len(picture) % 4)]
    sizes = [faces.nbytes, *(array.nbytes for array in arrays.values()), len(picture)]
    targets: list[int | None] = [_INDICES, *(_VERTICES for _ in arrays), None]
    views, at = [], 0
    for size, target in zip(sizes, targets, strict=True):
        views.append({"buffer": 0, "byteOffset": at, "byteLength": size} | ({"target": target} if target else {}))
        at += size + -size % 4
    accessors: list[dict[str, Any]] = [
        {"bufferView": 0, "componentType": _UINT32, "count": int(faces.size), "type": "SCALAR"}
    ]
    for index, array in enumerate(arrays.values(), start=1):
        accessor = {"bufferView": index, "componentType": _FLOAT, "count": len(array), "type": kinds[array.shape[1]]}
        accessors.append(accessor)
    accessors[1] |= {"min": arrays["POSITION"].min(axis=0).tolist(), "max": arrays["POSITION"].max(axis=0).tolist()}
    attributes = {name: index for index, name in enumerate(arrays, start=1)}
    document = {
        "asset": {"version": "2.0", "generator": "densegeo", "extras": metadata},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": attributes, "indices": 0, "material": 0}]}],
        "materials": [
            {
                "doubleSided": True,
                "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0},
                "extensions": {"KHR_materials_unlit": {}},
            }
        ],
        "textures": [{"source": 0}],
        "images": [{"bufferView": len(views) - 1, "mimeType": "image/jpeg"}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": at}],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)

    def write(stream: BinaryIO) -> None:
        stream.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + at))
        stream.write(struct.pack("<I4s", len(text), b"JSON") + text)
        stream.write(struct.pack("<I4s", at, b"BIN\0"))
        for chunk in chunks:
            stream.write(chunk if isinstance(chunk, bytes) else chunk.tobytes())

    return write
