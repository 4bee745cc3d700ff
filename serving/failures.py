"""Which status an error is answered with, and why it counts as rejected."""

from __future__ import annotations

from typing import NamedTuple

from densegeo import errors as e


class Failure(NamedTuple):
    """status: of HTTP. reason: of `metrics.REASONS`, or None for what was taken on and went wrong."""

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


def failure(error: e.DensegeoError) -> Failure:
    """How an error is answered."""
    return next(answer for kind, answer in FAILURES if isinstance(error, kind))
