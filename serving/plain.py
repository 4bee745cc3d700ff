"""`POST /v1/geometry`: an encoded picture and fields in a form, one file back.

The fields are those of `Fields`, and the answers those of `ANSWERS`; the description at /docs is made from the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from densegeo.errors import (
    ConfigError,
    MediaTypeError,
    MissingOutputError,
    NotAcceptableError,
    NotMetricError,
    RequestError,
)
from densegeo.formats import RESULTS
from densegeo.outputs import Decode
from densegeo.runtime import Geometry
from densegeo.serving.body import parts
from densegeo.serving.metric_options import METRES, Metres, read_metres
from densegeo.serving.options import Options

IMAGE = "image"
FORM = "multipart/form-data"
_MAX_FIELDS, _FIELD_BYTES = 32, 2**20  # a megabyte of anchors is thirty thousand of them


class Answer(NamedTuple):
    """A media type that may be accepted, and the format of `Geometry.encode` that it is."""

    media_type: str
    format: str
    text: str


# The first is sent to who accepts anything.
ANSWERS = (
    Answer("application/x-npz", "npz", "arrays for numpy: prediction, normals, valid, and depth when metric"),
    Answer("application/json", "json", "the same as JSON, with what was said of them"),
    Answer("image/png", "png16", "16-bit millimetres, 0 where there is none; metric results alone"),
    Answer("model/ply", "ply", "a point cloud with normals; needs intrinsics, which alone give a shape without a unit"),
    Answer("model/gltf-binary", "glb", "a mesh for viewers; the same"),
)


class Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form's fields beside the picture and what makes the result metric."""

    model: Annotated[str | None, Meta(description="A model's name; the server's first one by default.")] = None
    outputs: Annotated[
        Annotated[list[Literal["depth", "normals"]], Meta(min_length=1)] | None,
        Meta(description="Which are wanted, commas between; all that there are by default."),
    ] = None
    deadline_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Milliseconds from arrival until the request's turn must have come."),
    ] = None


FIELDS = Fields.__struct_fields__


class GeometryRequest(NamedTuple):
    """picture: encoded bytes."""

    picture: bytes
    fields: Fields
    metres: Metres


async def read_form(request: Request, body: bytes, options: Options) -> GeometryRequest:
    """Raises MediaTypeError for another body than a form, RequestError and ConfigError for one that cannot be
    read."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != FORM:
        raise MediaTypeError(
            f"The body is {kind[:80] or 'of no type'!r}; send {FORM} with the picture as the file {IMAGE!r}, for "
            "example `curl -F image=@photo.jpg`."
        )
    parser = MultiPartParser(
        request.headers, parts(body), max_files=1, max_fields=_MAX_FIELDS, max_part_size=_FIELD_BYTES
    )
    parser.spool_max_size = options.max_body + 1  # never to disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        why = str(getattr(error, "message", error)).rstrip(".")
        raise RequestError(f"The form cannot be read: {why}.") from None
    named = form.multi_items()
    if len({name for name, _ in named}) != len(named):
        raise RequestError("The form has a field twice; each is given once.")
    picture = form.get(IMAGE)
    if not isinstance(picture, UploadFile):
        raise RequestError(f"The form has no file {IMAGE!r}; send the picture under that name.")
    texts = {name: value for name, value in named if name != IMAGE}
    return GeometryRequest(await picture.read(), *_read_texts(texts))


def _read_texts(texts: Mapping[str, Any]) -> tuple[Fields, Metres]:
    unknown = [name for name in texts if name not in (*FIELDS, *METRES)]
    if unknown:
        raise RequestError(f"There is no field {unknown[0][:60]!r}; there are {', '.join((IMAGE, *FIELDS, *METRES))}.")
    empty = [name for name, value in texts.items() if isinstance(value, str) and not value.strip()]
    if empty:
        raise RequestError(f"The field {empty[0]} is empty: give it a value, or leave it out.")
    values: dict[str, Any] = {name: value for name, value in texts.items() if name in FIELDS}
    if isinstance(text := values.get("outputs"), str):
        values["outputs"] = [part.strip() for part in text.strip().strip("[]").split(",")]
    try:
        fields = msgspec.convert(values, Fields, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(f"The form's fields cannot be read: {error}.") from None
    return fields, read_metres({name: value for name, value in texts.items() if name in METRES})


def choose_answer(accept: str | None) -> Answer:
    """The media type that the client wants most of those there are, by its Accept header. Raises NotAcceptableError."""
    ranked = sorted(_accepted(accept or "*/*"), key=lambda pair: -pair[1])
    for media_range, quality in ranked:
        for answer in ANSWERS if quality > 0 else ():
            if media_range in (answer.media_type, "*/*", f"{answer.media_type.partition('/')[0]}/*"):
                return answer
    raise NotAcceptableError(
        f"None of {', '.join(answer.media_type for answer in ANSWERS)} is accepted: Accept is {(accept or '')[:80]!r}."
    )


def _accepted(header: str) -> list[tuple[str, float]]:
    """Media ranges of an Accept header with their qualities; an unreadable quality is 0."""
    ranges = []
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        ranges.append((name, quality))
    return ranges


def rehearse(request: GeometryRequest, answer: Answer, decode: Decode) -> None:
    """Raise, before anything runs, what `write_geometry` would raise whatever the picture."""
    for name in request.fields.outputs or ():
        if not decode.has(name):
            available = " and ".join(output.kind for output in decode.outputs)
            raise MissingOutputError(f"There are no {name} to be had: this model has {available}.")
    geometry = request.metres.rehearse(decode)
    row = RESULTS[answer.format]
    if row.needs != "nothing" and request.fields.outputs is not None and "depth" not in request.fields.outputs:
        raise RequestError(f"{answer.media_type} holds depth, and outputs leaves it out: add depth, or accept another.")
    if row.needs == "metres":
        geometry.require_prediction(row.about)
        if geometry.depth_kind != "metric":
            raise NotMetricError(
                f"{answer.media_type} holds millimetres, and nothing tells the unit: give near and far, scale and "
                "shift, or a measurement: anchors, or with intrinsics camera_height or size."
            )
    elif row.needs == "depth" and not _to_scale(request, answer):
        geometry.require_depth(row.about)
    if row.intrinsics and request.metres.intrinsics is None:
        raise ConfigError(f"{answer.media_type} needs the camera: give intrinsics, fx,fy,cx,cy.")


def write_geometry(request: GeometryRequest, answer: Answer, geometry: Geometry, warned: Sequence[str] = ()) -> bytes:
    """The answer's file. warned: texts of warnings, which grow meanwhile; JSON has them as `warnings`.

    Raises what `to_metric` and `Geometry.encode` raise.
    """
    outputs, intrinsics = request.fields.outputs, request.metres.intrinsics
    result = request.metres.apply(geometry)
    if intrinsics is not None and _to_scale(request, answer):
        result = result.to_scale(intrinsics)
    if outputs is not None and "depth" not in outputs:
        result = dataclasses.replace(result, prediction=None, depth_kind=None, calibration=None)
    if outputs is not None and "normals" not in outputs:
        result = dataclasses.replace(result, normals=None)
    written = result.encode(answer.format, intrinsics=intrinsics, image=request.picture)
    if answer.format == "json":
        return b'{"warnings": ' + msgspec.json.encode(warned) + b", " + written.lstrip()[1:]
    return written


def _to_scale(request: GeometryRequest, answer: Answer) -> bool:
    """Whether a shape is wanted, of which nothing tells the unit."""
    shape = RESULTS[answer.format].needs == "depth"
    return shape and not request.metres.is_metric and request.metres.intrinsics is not None
