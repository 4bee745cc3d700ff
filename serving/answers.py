"""Which status an error is answered with, and why it counts as rejected; the JSON of an error."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from starlette.responses import Response

from densegeo import errors as e


class Failure(NamedTuple):
    """reason: of `metrics.REASONS`, or None for what was taken on and went wrong."""

    status: int
    reason: str | None


# The first row that an error is of is its own.
FAILURES: tuple[tuple[type[e.DensegeoError], Failure], ...] = (
    (e.ImageTooLargeError, Failure(413, "too_large")),
    (e.BodyTooLargeError, Failure(413, "too_large")),
    (e.ImageFormatError, Failure(415, "media_type")),
    (e.MediaTypeError, Failure(415, "media_type")),
    (e.NotAcceptableError, Failure(406, "media_type")),
    (e.MethodError, Failure(405, "not_found")),
    (e.SlowRequestError, Failure(408, "slow")),
    (e.UnauthorizedError, Failure(401, "unauthorized")),
    (e.ForbiddenError, Failure(403, "forbidden")),
    (e.NotFoundError, Failure(404, "not_found")),
    (e.BusyError, Failure(503, "busy")),
    (e.QueueFullError, Failure(503, "queue_full")),
    (e.NotReadyError, Failure(503, "not_ready")),
    (e.ShutdownError, Failure(503, "not_ready")),
    (e.BackendTimeoutError, Failure(503, None)),
    (e.DeadlineError, Failure(504, "deadline")),
    (e.RequestError, Failure(400, "bad_request")),
    (e.ImageError, Failure(400, "bad_request")),
    (e.CalibrationError, Failure(400, "bad_request")),
    (e.NotMetricError, Failure(400, "bad_request")),
    (e.MissingOutputError, Failure(400, "bad_request")),
    (e.ConfigError, Failure(400, "bad_request")),
    (e.BundleError, Failure(503, "not_ready")),  # replaced, and a part was needed that is not in memory
    (e.DensegeoError, Failure(500, None)),
)


class Error(msgspec.Struct, frozen=True):
    """error: what was wrong and what to do. type: the error's name, for programs."""

    error: str
    type: str


def failure(error: e.DensegeoError) -> Failure:
    """How an error is answered."""
    return next(found for kind, found in FAILURES if isinstance(error, kind))


def error_response(status: int, text: str, name: str) -> Response:
    """The JSON that every error is answered with."""
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 503 else {}
    return json_response(Error(text, name), status, headers)


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Anything that msgspec encodes."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
