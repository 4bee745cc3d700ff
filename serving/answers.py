"""What an error is answered with: a status, and JSON that says what was wrong."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


class Error(msgspec.Struct, frozen=True):
    """error: what was wrong and what to do. type: the error's name, for programs."""

    error: str
    type: str


def error_response(status: int, text: str, name: str) -> Response:
    """The JSON that every error is answered with."""
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 503 else {}
    return json_response(Error(text, name), status, headers)


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Anything that msgspec encodes."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
