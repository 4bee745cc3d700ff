"""The table of routes: what the server answers, and what /docs says of it, are both made from it."""

from __future__ import annotations

import zlib
from importlib import resources
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from densegeo import __version__
from densegeo.errors import BackendError, BundleError, NotFoundError, RequestError
from densegeo.runtime import colormap
from densegeo.serving import plain, v2
from densegeo.serving.answers import error_response, json_response
from densegeo.serving.body import read_body, unless_gone
from densegeo.serving.front import Front
from densegeo.serving.metrics import ServingMetrics
from densegeo.serving.models import Model, version_of
from densegeo.serving.options import Options
from densegeo.serving.service import Deadline, Service
from densegeo.serving.tracing import Tracing

HEADER_LENGTH = "Inference-Header-Content-Length"
MODEL = "/v2/models/{model}"
VERSIONED = MODEL + "/versions/{version}"
_KINDS = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "json": "application/json",
    "svg": "image/svg+xml",
}
# The page's files by name: no other name is looked for. The colours are those of `Geometry.visualize`.
PAGE = {path.name: path.read_bytes() for path in (resources.files("densegeo.serving") / "page").iterdir()}
PAGE["colors.json"] = msgspec.json.encode(colormap.table().tolist())
# Nothing from elsewhere is loaded or asked, and no other page may put this one into a frame.
_POLICY = "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"


class Row(NamedTuple):
    """open: answered without the token. takes, gives: what the body and the answer are, for the description."""

    method: str
    path: str
    name: str  # of a method of `Handlers`
    summary: str
    open: bool = False
    takes: Any = None
    gives: Any = None


class ServerMetadata(msgspec.Struct, frozen=True):
    name: str
    version: str
    extensions: list[str]


class Health(msgspec.Struct, frozen=True):
    live: bool


class ModelReady(msgspec.Struct, frozen=True):
    name: str
    ready: bool


class Tensor(msgspec.Struct, frozen=True):
    """shape: -1 where any size is taken or given."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, frozen=True):
    """parameters: depth_kind, the bundle's model and precision, its sizes, where it runs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: dict[str, Any]


class ModelList(msgspec.Struct, frozen=True):
    models: list[str]


class IndexRequest(msgspec.Struct, frozen=True):
    """ready: only models that take requests."""

    ready: bool = False


class IndexEntry(msgspec.Struct, frozen=True):
    name: str
    version: str
    state: str
    reason: str


class LoadRequest(msgspec.Struct, frozen=True):
    """parameters: none is known; a bundle says all of itself."""

    parameters: dict[str, Any] = {}


ROWS = (
    Row("GET", "/", "page", "The page.", open=True),
    Row("GET", "/page/{file}", "file", "What the page is made of.", open=True),
    Row("GET", "/docs", "docs", "This description, to read.", open=True),
    Row("GET", "/openapi.json", "openapi", "This description, as OpenAPI 3.1.", open=True),
    Row("GET", "/metrics", "prometheus", "Counts and times, in Prometheus' text format."),
    Row("GET", "/v2", "server", "Name, version and extensions of this server.", gives=ServerMetadata),
    Row("GET", "/v2/health/live", "live", "Whether the server answers.", open=True, gives=Health),
    Row(
        "GET",
        "/v2/health/ready",
        "ready",
        "200 when all models but unloaded ones take requests.",
        open=True,
        gives=Health,
    ),
    Row("GET", "/v2/models", "models", "Names of the models.", gives=ModelList),
    Row("GET", MODEL, "model", "Inputs and outputs of a model.", gives=ModelMetadata),
    Row("GET", VERSIONED, "model", "The same, of one version.", gives=ModelMetadata),
    Row("GET", MODEL + "/ready", "model_ready", "200 when it takes requests, else 503.", gives=ModelReady),
    Row("GET", VERSIONED + "/ready", "model_ready", "The same, of one version.", gives=ModelReady),
    Row("POST", MODEL + "/infer", "infer", "Pixels to maps.", takes=v2.Body, gives=v2.Answer),
    Row("POST", VERSIONED + "/infer", "infer", "The same, of one version.", takes=v2.Body, gives=v2.Answer),
    Row("POST", "/v2/repository/index", "index", "State of the models.", takes=IndexRequest, gives=list[IndexEntry]),
    Row(
        "POST",
        "/v2/repository/models/{model}/load",
        "load",
        "Open the bundle's folder anew; old requests end on the old one.",
        takes=LoadRequest,
    ),
    Row("POST", "/v2/repository/models/{model}/unload", "unload", "Release the model.", takes=LoadRequest),
    Row("POST", "/v1/geometry", "geometry", "An encoded picture to a file.", takes=plain.Fields, gives=plain.ANSWERS),
)


def application(service: Service, options: Options, metrics: ServingMetrics | None = None) -> Front:
    """The whole server as an ASGI application. metrics: its counters, by default new ones."""
    metrics, tracing = metrics or ServingMetrics(service), Tracing()
    handlers = Handlers(service, options, metrics, tracing)
    routes = [Route(row.path, getattr(handlers, row.name), methods=[row.method]) for row in ROWS]
    router = Router(routes, redirect_slashes=False)
    public = frozenset({row.path for row in ROWS if row.open} | {f"/page/{name}" for name in PAGE})
    return Front(router, service, options, metrics, tracing, public)


class Handlers:
    """One method a name of `ROWS`: a request in, a response out; what is wrong is raised."""

    def __init__(self, service: Service, options: Options, metrics: ServingMetrics, tracing: Tracing) -> None:
        self._service, self._options, self._metrics, self._tracing = service, options, metrics, tracing

    async def page(self, request: Request) -> Response:
        return _file("index.html")

    async def file(self, request: Request) -> Response:
        return _file(request.path_params["file"])

    async def docs(self, request: Request) -> Response:
        from densegeo.serving.openapi import page

        return Response(page(), headers={"Content-Security-Policy": _POLICY}, media_type="text/html")

    async def openapi(self, request: Request) -> Response:
        from densegeo.serving.openapi import document

        return json_response(document())

    async def prometheus(self, request: Request) -> Response:
        return Response(await self._metrics.whole(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def server(self, request: Request) -> Response:
        return json_response(ServerMetadata("densegeo", __version__, list(v2.EXTENSIONS)))

    async def live(self, request: Request) -> Response:
        return json_response(Health(True))

    async def ready(self, request: Request) -> Response:
        return json_response(Health(self._service.ready), 200 if self._service.ready else 503)

    async def models(self, request: Request) -> Response:
        return json_response(ModelList(list(self._service.models)))

    async def model(self, request: Request) -> Response:
        model = self._named(request)
        with model.lease() as estimator:
            manifest, backend, device = estimator.manifest, estimator.backend, estimator.device
        parameters = {
            "model": manifest.model,
            "precision": manifest.precision,
            "depth_kind": manifest.decode.depth_kind,
            "sizes": list(dict.fromkeys(str(bucket.size) for bucket in manifest.buckets)),
            "device": device,
            "weights_note": manifest.weights_note,
        }
        return json_response(v2.metadata(model.name, model.version, backend, manifest.decode, parameters))

    async def model_ready(self, request: Request) -> Response:
        model = self._named(request)
        ready = model.current is not None and not (self._service.draining or self._service.hung)
        return json_response(ModelReady(model.name, ready), 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        model = self._named(request)
        body = await read_body(request, self._service, self._options)
        return await unless_gone(self._infer(request, model, body), request)

    async def geometry(self, request: Request) -> Response:
        answer = plain.choose_answer(request.headers.get("accept"))
        body = await read_body(request, self._service, self._options)
        form = await plain.read_form(request, body, self._options)
        model = self._service.model(form.fields.model)
        return await unless_gone(self._geometry(request, model, form, answer), request)

    async def index(self, request: Request) -> Response:
        query = await self._json(request, IndexRequest)
        entries = [
            IndexEntry(model.name, model.version, "READY" if model.current else "UNAVAILABLE", model.reason)
            for model in self._service.models.values()
        ]
        return json_response([entry for entry in entries if entry.state == "READY" or not query.ready])

    async def load(self, request: Request) -> Response:
        model = self._replaceable(request)
        await self._without_parameters(request)
        try:
            await self._service.run(model.load)
        except (BundleError, BackendError) as error:  # the old one stays
            self._note(request, model, error=type(error).__name__, text=str(error)[:500])
            return error_response(400, str(error), type(error).__name__)
        return Response(status_code=200)

    async def unload(self, request: Request) -> Response:
        model = self._replaceable(request)
        await self._without_parameters(request, "unload_dependents")
        await self._service.run(model.unload)
        return Response(status_code=200)

    async def _infer(self, request: Request, model: Model, body: bytes) -> Response:
        length = request.headers.get(HEADER_LENGTH)
        coding = _coding(request.headers.get("accept-encoding"))
        with model.lease() as estimator:
            decode, max_images, version = estimator.manifest.decode, estimator.max_queue, version_of(estimator)
            inference = await self._service.run(lambda: v2.read_inference(body, length, decode, max_images))
            self._note(request, model, images=len(inference.images), id=inference.id[:128])
            deadline = Deadline(inference.deadline_ms, request.state.arrived)
            geometries = await self._service.estimate(estimator, inference.images, deadline)
        self._tracing.stages(geometries[0].timings)

        def write() -> tuple[bytes, int]:
            answer, header = v2.write_inference(inference, model.name, version, geometries, request.state.warnings)
            return (_packed(answer, coding), header) if coding else (answer, header)

        answer, header = await self._service.run(write)
        headers = {HEADER_LENGTH: str(header)} if header else {}
        headers |= {"Content-Encoding": coding} if coding else {}
        return Response(answer, 200, headers, "application/octet-stream" if header else "application/json")

    async def _geometry(
        self, request: Request, model: Model, form: plain.GeometryRequest, answer: plain.Answer
    ) -> Response:
        self._note(request, model, images=1, format=answer.format)
        deadline = Deadline(form.fields.deadline_ms, request.state.arrived)
        with model.lease() as estimator:
            plain.rehearse(form, answer, estimator.manifest.decode)
            (geometry,) = await self._service.estimate(estimator, [form.picture], deadline)
        self._tracing.stages(geometry.timings)
        warned = request.state.warnings
        written = await self._service.run(lambda: plain.write_geometry(form, answer, geometry, warned))
        return Response(written, 200, media_type=answer.media_type)

    def _named(self, request: Request) -> Model:
        return self._service.model(request.path_params["model"], request.path_params.get("version"))

    def _replaceable(self, request: Request) -> Model:
        if self._service.fixed:
            raise RequestError(self._service.fixed)
        return self._named(request)

    def _note(self, request: Request, model: Model, **more: Any) -> None:
        """For the request's line in the log."""
        request.state.fields.update(model=model.name, **more)

    async def _json(self, request: Request, kind: Any) -> Any:
        body = await read_body(request, self._service, self._options)
        try:
            return msgspec.json.decode(body or b"{}", type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise RequestError(f"The request is not valid: {error}.") from None

    async def _without_parameters(self, request: Request, *ignored: str) -> None:
        body = await self._json(request, LoadRequest)
        unknown = set(body.parameters) - set(ignored)
        if unknown:
            raise RequestError(f"The parameter {min(unknown)[:60]!r} is not supported: a bundle says all of itself.")


def _file(name: str) -> Response:
    content = PAGE.get(name)
    if content is None:
        raise NotFoundError(f"The page has no file {name[:60]!r}.")
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return Response(content, 200, headers, _KINDS[name.rpartition(".")[2]])


def _coding(accepted: str | None) -> str | None:
    """gzip or deflate, where it is all that the client names: who lists what it can read has not asked for it, and on
    maps of noise-like floats packing takes longer than most networks.
    """
    name = (accepted or "").strip().lower()
    return name if name in ("gzip", "deflate") else None


def _packed(data: bytes, coding: str) -> bytes:
    machine = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS + (16 if coding == "gzip" else 0))
    return machine.compress(data) + machine.flush()
