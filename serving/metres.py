"""What of a request makes a result metric: the same names as `Geometry.to_metric`, in parameters and form fields."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from densegeo.errors import CalibrationError, RequestError
from densegeo.runtime import Geometry

Anchor = tuple[float, float, float]


class Metres(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing, or one of: near and far; scale and shift; anchors."""

    near: Annotated[float | None, Meta(description="Depth of the nearest point, metres; goes with far.")] = None
    far: Annotated[float | None, Meta(description="Depth of the farthest point, metres.")] = None
    scale: Annotated[
        float | None, Meta(description="Known scale of the prediction, see depth_kind; goes with shift.")
    ] = None
    shift: Annotated[float | None, Meta(description="Known shift of the prediction.")] = None
    anchors: Annotated[
        list[Anchor] | None,
        Meta(description="Known depths: [[column, row, metres], ...], at least three, pixel centres at integers."),
    ] = None

    @property
    def given(self) -> bool:
        """Whether the result is to be metric."""
        return any(getattr(self, name) is not None for name in METRES)

    def apply(self, geometry: Geometry) -> Geometry:
        """The result in metres, or as it is where nothing was given. Raises CalibrationError, MissingOutputError."""
        if not self.given:
            return geometry
        given: dict[str, Any] = {name: getattr(self, name) for name in METRES if getattr(self, name) is not None}
        if "anchors" in given:
            if not given["anchors"]:
                raise CalibrationError("anchors is empty; give at least three as [[column, row, metres], ...].")
            given["anchors"] = ([row[:2] for row in given["anchors"]], [row[2] for row in given["anchors"]])
        return geometry.to_metric(**given)


METRES = Metres.__struct_fields__


def read_metres(given: dict[str, Any]) -> Metres:
    """Of parameters or form fields: numbers may be text, anchors may be JSON in text. Raises RequestError."""
    try:
        if isinstance(anchors := given.get("anchors"), str):
            given = given | {"anchors": msgspec.json.decode(anchors.encode())}
        return msgspec.convert(given, Metres, strict=False)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise RequestError(f"What should make the result metric cannot be read: {error}.") from None
