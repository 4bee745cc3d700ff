"""The front of the server: every request passes here once, and leaves with an answer, a log line and a count.

Who may ask (host, origin, token) and how many at once is decided before anything of a body is read.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from densegeo.errors import (
    BusyError,
    DensegeoError,
    ForbiddenError,
    MethodError,
    NotFoundError,
    RequestError,
    UnauthorizedError,
)
from densegeo.serving.answers import error_response
from densegeo.serving.body import ClientGoneError
from densegeo.serving.failures import failure
from densegeo.serving.logs import FIELDS, WARNINGS, request_id
from densegeo.serving.metrics import ServingMetrics
from densegeo.serving.options import Options
from densegeo.serving.service import Service
from densegeo.serving.tracing import Tracing

log = logging.getLogger("densegeo.serving")

GONE = 499  # in logs and counts: the client left, nothing was answered
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
WARNINGS_HEADER = "X-Densegeo-Warnings"
_MOST_HEADER = 2000  # characters; clients and proxies refuse long headers
_EXPOSED = f"Inference-Header-Content-Length, X-Request-ID, Retry-After, {WARNINGS_HEADER}"


class Front:
    """An ASGI application over the router. public: paths that need no token."""

    def __init__(
        self,
        router: Router,
        service: Service,
        options: Options,
        metrics: ServingMetrics,
        tracing: Tracing,
        public: frozenset[str],
    ) -> None:
        self._router, self._service, self._options, self._metrics = router, service, options, metrics
        self._tracing, self._public = tracing, public
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(scope, headers, send, self._options, self._service)
        self._open += 1
        self._metrics.open.set(self._open)
        attributes = {"http.request.method": scope["method"], "densegeo.request_id": exchange.id}
        try:
            with (
                WARNINGS.about(exchange.id) as exchange.warnings,
                self._tracing.request(scope["method"], headers, attributes) as span,
            ):
                await self._answer(scope, headers, receive, exchange)
                if span is not None:
                    span.update_name(f"{scope['method']} {exchange.route}")
                    span.set_attributes({"http.route": exchange.route, "http.response.status_code": exchange.status})
        finally:
            self._open -= 1
            self._metrics.open.set(self._open)
            self._account(scope, exchange)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, exchange: _Exchange) -> None:
        try:
            response = self._refuse(scope, headers)
            if response is not None:
                await response(scope, receive, exchange.send)
                return
            scope["app"] = self
            scope["state"] = {
                "arrived": exchange.started,
                "fields": exchange.fields,
                "warnings": exchange.warnings,
            }
            await self._router(scope, receive, exchange.send)
        except ClientGoneError:
            exchange.status = GONE
        except HTTPException as error:  # of the router: 404 and 405
            allowed = (error.headers or {}).get("Allow")
            refused: RequestError = NotFoundError(f"There is nothing at {scope['path'][:200]}; /docs says what is.")
            if error.status_code == 405:
                refused = MethodError(f"{scope['path'][:200]} takes {allowed}, not {scope['method'][:20]}; see /docs.")
            status, reason = failure(refused)
            exchange.fail(refused, reason)
            response = error_response(status, str(refused), type(refused).__name__)
            response.headers.update(error.headers or {})
            await self._send(response, scope, receive, exchange)
        except DensegeoError as error:
            status, reason = failure(error)
            exchange.fail(error, reason)
            await self._send(error_response(status, str(error), type(error).__name__), scope, receive, exchange)
        except Exception as error:
            log.exception("a request failed in a way that nobody foresaw", extra={FIELDS: {"request_id": exchange.id}})
            exchange.fail(error, None)
            text = f"The server failed; its log has the reason under the request's id, {exchange.id}."
            await self._send(error_response(500, text, "InternalError"), scope, receive, exchange)

    async def _send(self, response: Response, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        if not exchange.status:  # else part of an answer has gone out, and the connection is cut
            await response(scope, receive, exchange.send)

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        """An answer to what needs no route (a browser asking whether it may ask); raises what is refused."""
        self._check_host(headers)
        origin = headers.get("origin")
        if origin is not None and not self._own(origin, headers) and origin not in self._options.origins:
            raise ForbiddenError(
                f"Pages of {origin[:200]} may not ask here. If they may, start the server with "
                f"--allow-origin {origin[:200]}."
            )
        if scope["method"] == "OPTIONS":
            allowed = {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "Authorization, Content-Type, Accept, Inference-Header-Content-Length, "
                "X-Request-ID",
                "Access-Control-Max-Age": "600",
            }
            return Response(status_code=204, headers=allowed)
        if scope["path"] not in self._public:
            self._check_token(headers)
            if self._open > self._options.max_requests:
                raise BusyError(f"{self._options.max_requests} requests are being answered. Try again in a moment.")
        return None

    def _check_host(self, headers: Headers) -> None:
        """On a loopback address, a name that leads here must be one of ours: else any page could lead its own here."""
        if not self._options.loopback:
            return
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if name not in _LOOPBACK | self._options.hosts:
                raise ForbiddenError(
                    f"This server is not called {name[:200]!r}. Start it with --allow-host {name[:200]} if it is."
                ) from None

    def _own(self, origin: str, headers: Headers) -> bool:
        return origin.partition("://")[2].lower() == headers.get("host", "").lower() != ""

    def _check_token(self, headers: Headers) -> None:
        if self._options.token is None:
            return
        kind, _, token = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(token.strip().encode("latin-1", "replace"), self._options.token)
        if kind.lower() != "bearer" or not right:
            raise UnauthorizedError("This server wants its token: send `Authorization: Bearer TOKEN`.")

    def _account(self, scope: Scope, exchange: _Exchange) -> None:
        seconds = time.monotonic() - exchange.started
        route = exchange.route
        status = exchange.status or GONE
        if status == GONE:
            self._metrics.gone.labels(route).inc()
        else:
            self._metrics.answers.labels(route, str(status)).inc()
        if exchange.reason is not None:
            self._metrics.rejected.labels(exchange.reason).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        quiet = route in self._public and status < 400  # probes and the page's own files
        fields = {
            "request_id": exchange.id,
            "method": scope["method"],
            "route": route,
            "path": scope["path"][:200],
            "status": status,
            "ms": round(1e3 * seconds, 3),
            "client": (scope.get("client") or ("",))[0],
            **exchange.fields,
            **({"warnings": exchange.warnings} if exchange.warnings else {}),
        }
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={FIELDS: fields})


class _Exchange:
    """One request and what is known of its answer so far. status: 0 until an answer starts."""

    def __init__(self, scope: Scope, headers: Headers, send: Send, options: Options, service: Service) -> None:
        self.id = request_id(headers.get("x-request-id"))
        self.started = time.monotonic()
        self.status = 0
        self.reason: str | None = None
        self.fields: dict[str, Any] = {}
        self.warnings: list[str] = []
        self._scope, self._send, self._service = scope, send, service
        origin = headers.get("origin")
        self._origin = origin if origin in options.origins else None

    @property
    def route(self) -> str:
        """The address with its parameters' names, so that there are few of them."""
        route = self._scope.get("route")
        return str(getattr(route, "path", "unknown"))

    def fail(self, error: Exception, reason: str | None) -> None:
        self.reason = reason
        self.fields |= {"error": type(error).__name__, "text": str(error)[:500]}

    async def send(self, message: Message) -> None:
        """Pass on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self.id
            headers["X-Content-Type-Options"] = "nosniff"
            if self.warnings:
                headers[WARNINGS_HEADER] = _as_header(self.warnings)
            if self._origin is not None:
                headers["Access-Control-Allow-Origin"] = self._origin
                headers["Access-Control-Expose-Headers"] = _EXPOSED
                headers.add_vary_header("Origin")
            if self._service.draining or self._service.hung:
                headers["Connection"] = "close"
        await self._send(message)


def _as_header(texts: list[str]) -> str:
    """A JSON list in ASCII: all texts, or as many of the first as a header should hold."""
    count = len(texts)
    while count and len(json.dumps(texts[:count])) > _MOST_HEADER:
        count -= 1
    return json.dumps(texts[:count] or [texts[0][: _MOST_HEADER // 8]])
