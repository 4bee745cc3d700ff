"""What of a request makes a result metric: the same names as `Geometry.to_metric`, in parameters and form fields."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from densegeo.errors import CalibrationError, MissingOutputError, RequestError
from densegeo.outputs import Decode
from densegeo.runtime import Camera, Geometry
from densegeo.serving.logs import WARNINGS
from densegeo.size import Size

Anchor = tuple[float, float, float]
Pixel = tuple[float, float]
_TYPES = {"float": "a number", "array": "a list", "str": "text", "bool": "true or false", "int": "a whole number"}
PROBE = Size(8, 8)
_STRUCTURED = ("anchors", "up", "size", "intrinsics")  # JSON in text, where they come as text


class Metres(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing; near and far; scale and shift; or any of anchors, camera_height and size, which intrinsics help."""

    near: Annotated[float | None, Meta(description="Depth of the nearest point, metres; goes with far.")] = None
    far: Annotated[float | None, Meta(description="Depth of the farthest point, metres.")] = None
    scale: Annotated[
        float | None, Meta(description="Known scale of the prediction, see depth_kind; goes with shift.")
    ] = None
    shift: Annotated[float | None, Meta(description="Known shift of the prediction.")] = None
    anchors: Annotated[
        list[Anchor] | None,
        Meta(
            description="Known depths: [[column, row, metres], ...], pixel centres at integers; three at least, with "
            "intrinsics one."
        ),
    ] = None
    camera_height: Annotated[
        float | None, Meta(description="Metres of the camera over a floor that it sees; needs intrinsics.")
    ] = None
    up: Annotated[
        tuple[float, float, float] | None,
        Meta(description="[x, y, z] against gravity in the camera's frame (x right, y down, z forward)."),
    ] = None
    size: Annotated[
        tuple[Pixel, Pixel, float] | None,
        Meta(description="[[column, row], [column, row], metres]: two pixels and their distance; needs intrinsics."),
    ] = None
    intrinsics: Annotated[
        tuple[float, float, float, float] | None,
        Meta(description="[fx, fy, cx, cy] in pixels of the upright picture, pixel centres at integers."),
    ] = None

    @property
    def is_metric(self) -> bool:
        """Whether the result is to be metric."""
        return any(getattr(self, name) is not None for name in METRES if name not in ("up", "intrinsics"))

    def apply(self, geometry: Geometry) -> Geometry:
        """The result in metres, or as it is where nothing was given. Raises CalibrationError, MissingOutputError."""
        if not self.is_metric:
            return geometry
        arguments: dict[str, Any] = {name: getattr(self, name) for name in METRES if getattr(self, name) is not None}
        if "anchors" in arguments:
            arguments["anchors"] = ([row[:2] for row in arguments["anchors"]], [row[2] for row in arguments["anchors"]])
        if "size" in arguments:
            arguments["size"] = (arguments["size"][:2], arguments["size"][2])
        return geometry.to_metric(**arguments)

    def rehearse(self, decode: Decode) -> Geometry:
        """Raise what `apply` would raise whatever the picture; a small result of the model's kinds, made metric so."""
        self._check()
        if self.camera_height is not None and not decode.has("normals"):
            raise MissingOutputError("camera_height needs normals, to find the floor, and this model has none.")
        probe = _probe(decode)
        if self._has_measurements:  # what they say hangs on the picture; that metres come of them does not
            return probe.to_metric(near=1.0, far=2.0)
        with WARNINGS.about("the probe"):  # what it warns of, the picture's own result may be free of
            return msgspec.structs.replace(self, up=None, intrinsics=None).apply(probe)

    @property
    def _has_measurements(self) -> bool:
        return not (self.anchors is None and self.camera_height is None and self.size is None)

    def _check(self) -> None:
        """Raises CalibrationError, ConfigError for numbers that no picture could go with."""
        has_range, has_line = (self.near, self.far) != (None, None), (self.scale, self.shift) != (None, None)
        if self._has_measurements + has_range + has_line > 1:
            raise CalibrationError(
                "Give exactly one of: scale and shift; near and far; measurements (anchors, camera_height, size)."
            )
        if self.intrinsics is not None:
            Camera.of(self.intrinsics)
        if self.anchors is not None:
            if not self.anchors:
                raise CalibrationError("anchors is empty: give [[column, row, metres], ...], or leave it out.")
            if not all(math.isfinite(value) for row in self.anchors for value in row):
                raise CalibrationError("Anchors must be finite; remove those with NaN or infinite numbers.")
            if min(row[2] for row in self.anchors) <= 0:
                raise CalibrationError("Anchor depths must be positive metres; remove zeros and negative values.")
        if self.camera_height is not None and not 0 < self.camera_height < math.inf:
            raise CalibrationError(f"camera_height must be metres above 0, not {self.camera_height:g}.")
        if self.up is not None and self.camera_height is None:
            raise CalibrationError("up says how camera_height is measured: give camera_height too.")
        if self.up is not None and (not any(self.up) or not all(map(math.isfinite, self.up))):
            raise CalibrationError("up must be three numbers: the direction against gravity in the camera's frame.")
        if self.size is not None and not 0 < self.size[2] < math.inf:
            raise CalibrationError(f"The distance in size must be metres above 0, not {self.size[2]:g}.")
        for name in ("camera_height", "size"):
            if getattr(self, name) is not None and self.intrinsics is None:
                raise CalibrationError(f"{name} needs intrinsics: give them too.")


@lru_cache(maxsize=16)
def _probe(decode: Decode) -> Geometry:
    """A small result of a model's kinds, with all of a prediction's range."""
    shape = (PROBE.height, PROBE.width)
    prediction = np.linspace(0, 1, PROBE.width * PROBE.height, dtype=np.float32).reshape(shape)
    normals = np.full((*shape, 3), (0, 0, -1), np.float32)
    return Geometry(
        prediction if decode.has("depth") else None,
        decode.depth_kind,
        normals if decode.has("normals") else None,
        np.ones(shape, bool),
        PROBE,
    )


METRES = Metres.__struct_fields__


def read_metres(parameters: dict[str, Any]) -> Metres:
    """Of parameters or form fields: numbers may be text, lists JSON in text, flat ones without brackets too.

    Raises RequestError.
    """
    try:
        for name in _STRUCTURED:
            if isinstance(text := parameters.get(name), str):
                nested = text.lstrip().startswith("[")
                listed = msgspec.json.decode(text.encode()) if nested else [part.strip() for part in text.split(",")]
                parameters = parameters | {name: listed}
        return msgspec.convert(parameters, Metres, strict=False)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise RequestError(f"What should make the result metric cannot be read: {_in_words(str(error))}.") from None


def _in_words(error: str) -> str:
    """Of a value of another type, without its decoder's notation."""
    match = re.fullmatch(r"Expected `(\w+).*`, got `(.+)` - at `\$\.(\w+).*`", error)
    if match is None:
        return error
    expected, actual, name = match.groups()
    return f"{name} must be {_TYPES.get(expected, expected)}, not {_TYPES.get(actual, actual)}"
