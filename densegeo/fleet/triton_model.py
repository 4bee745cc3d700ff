"""The model of Triton Inference Server's Python backend: requests to `Estimator.submit`, geometries to responses.

Runs in the process that Triton starts for each model instance. The file `model.py` that `densegeo export-triton` writes
imports the class from here; the bundle lies beside that file, and options stand in the model's configuration.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendTimeoutError, ConfigError, DensegeoError, RequestError
from densegeo.outputs import Decode
from densegeo.runtime import Estimator, Geometry
from densegeo.serving.failures import failure
from densegeo.serving.logs import FIELDS, WARNINGS, start_logging
from densegeo.serving.metric_options import METRES, Metres, read_metres
from densegeo.serving.options import MAX_PIXELS
from densegeo.serving.v2 import INPUT, known_parameters, output_names, require_output
from densegeo.signals import EXIT_HUNG

log = logging.getLogger("densegeo.fleet")

BUNDLE = "bundle"  # the folder in a version's
OPTIONS = "densegeo"  # the configuration's parameter that holds `InstanceOptions` as JSON
HUNG_GRACE_S = 1.0  # so that what waits is answered first
# HTTP statuses as Triton's codes; any other is INTERNAL. Triton itself answers a request that waited too long so.
_CODES = {400: "INVALID_ARG", 413: "INVALID_ARG", 415: "INVALID_ARG", 503: "UNAVAILABLE", 504: "UNAVAILABLE"}


class InstanceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an instance opens its bundle: arguments of `Estimator`."""

    backend: str = "auto"
    threads: int | None = None
    timeout_s: float | None = 60.0
    max_pixels: int = MAX_PIXELS


@dataclass(eq=False)
class _InferenceRequest:
    """One request. images: (h, w, 3) uint8. error: why it cannot be answered, or None so far."""

    triton_request: Any
    images: Sequence[NDArray[np.uint8]] = ()
    outputs: Sequence[str] = ()
    metres: Metres = field(default_factory=Metres)
    deadline_ms: float | None = None
    futures: list[Future[Geometry]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def id(self) -> str:
        """As its client named it."""
        return str(self.triton_request.request_id())


class TritonPythonModel:
    """What Triton's Python backend calls, in one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside this version's `model.py`. Raises BundleError, BackendError, ConfigError."""
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        start_logging()
        self._collected_warnings = contextlib.ExitStack()
        self._collected_warnings.enter_context(WARNINGS.collected())
        config = json.loads(args["model_config"])
        options = read_options(config)
        directory = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        device = device_of(args["model_instance_kind"], args["model_instance_device_id"])
        max_batch = max(1, int(config["max_batch_size"]))
        self._estimator = Estimator(
            directory,
            options.backend,
            device,
            threads=options.threads,
            timeout_s=options.timeout_s,
            max_pixels=options.max_pixels,
            max_batch=max_batch,
            max_queue=max_batch,
            keep_replaced=True,
        )
        fields = {"model": args["model_name"], "version": args["model_version"], "device": self._estimator.device}
        log.info("loaded", extra={FIELDS: fields})

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request. What one request has wrong is its own error, and no other's."""
        read = [self._read(request) for request in requests]
        for request in read:  # all before the first is waited for, so that they run together
            self._guarded(request, self._submit)
        responses = [self._respond(request) for request in read]
        if any(isinstance(request.error, BackendTimeoutError) for request in read):
            self._leave()
        return responses

    def finalize(self) -> None:
        """Release the bundle."""
        self._estimator.close()
        self._collected_warnings.close()

    def _read(self, triton_request: Any) -> _InferenceRequest:
        request = _InferenceRequest(triton_request)
        self._guarded(request, self._understand)
        return request

    def _understand(self, request: _InferenceRequest) -> None:
        decode = self._estimator.manifest.decode
        tensor = self._triton.get_input_tensor_by_name(request.triton_request, INPUT)
        request.images = images_of(tensor.as_numpy())
        request.metres = metres_of(request.triton_request.parameters())
        request.outputs = outputs_of(request.triton_request.requested_output_names(), decode, request.metres)
        request.metres.rehearse(decode)
        microseconds = request.triton_request.timeout()
        request.deadline_ms = microseconds / 1e3 if microseconds else None

    def _submit(self, request: _InferenceRequest) -> None:
        if request.triton_request.is_cancelled():
            raise CancelledError
        for image in request.images:
            request.futures.append(self._estimator.submit(image, deadline_ms=request.deadline_ms))

    def _respond(self, request: _InferenceRequest) -> Any:
        tensors: list[Any] = []

        def collect(request: _InferenceRequest) -> None:
            geometries = [request.metres.apply(future.result()) for future in request.futures]
            for name in request.outputs:
                maps = np.stack([getattr(geometry, name) for geometry in geometries])
                tensors.append(self._triton.Tensor(name, np.ascontiguousarray(maps, np.float32)))

        self._guarded(request, collect)
        if request.warnings:
            log.warning("warned", extra={FIELDS: {"request_id": request.id, "warnings": request.warnings}})
        if request.error is None:
            return self._triton.InferenceResponse(tensors)
        for future in request.futures:
            future.cancel()
        return self._triton.InferenceResponse([], self._error(request))

    def _guarded(self, request: _InferenceRequest, call: Any) -> None:
        """Call with the request unless it has failed; what is raised is its error."""
        if request.error is not None:
            return
        try:
            with WARNINGS.about(request.id) as texts:
                call(request)
        except (Exception, CancelledError) as error:
            request.error = error
        request.warnings += [text for text in texts if text not in request.warnings]

    def _error(self, request: _InferenceRequest) -> Any:
        error = request.error
        if isinstance(error, CancelledError):
            code, text = "CANCELLED", "The client cancelled the request; it was not run."
        elif isinstance(error, DensegeoError):
            code, text = _CODES.get(failure(error).status, "INTERNAL"), f"{type(error).__name__}: {error}"
        else:
            log.error("a request failed in a way that nobody foresaw", exc_info=error)
            code, text = "INTERNAL", f"{type(error).__name__}: {error}; the server's log has more."
        return self._triton.TritonError(text, getattr(self._triton.TritonError, code))

    def _leave(self) -> None:
        """A backend that does not return cannot be stopped: end this process, so that its memory is free for the next,
        which Triton (2.51) starts when the model is loaded again; until then it answers every request with an error.
        """
        log.error("a backend did not return in time: this process ends", extra={FIELDS: {"exit_code": EXIT_HUNG}})

        def end() -> None:
            time.sleep(HUNG_GRACE_S)
            logging.shutdown()
            os._exit(EXIT_HUNG)

        threading.Thread(target=end, name="densegeo-leave", daemon=True).start()


def read_options(config: Mapping[str, Any]) -> InstanceOptions:
    """Of a model's configuration. Raises ConfigError."""
    text = config.get("parameters", {}).get(OPTIONS, {}).get("string_value", "{}")
    try:
        return msgspec.json.decode(text, type=InstanceOptions)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"The parameter {OPTIONS} of config.pbtxt is not valid: {error}. `densegeo export-triton "
            "--replace-config` writes it anew."
        ) from None


def device_of(kind: str, number: str) -> str:
    """Of an instance's kind and device."""
    return f"cuda:{number}" if kind.upper().endswith("GPU") else "cpu"


def images_of(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """(batch, h, w, 3) -> one array an image. Raises RequestError."""
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape or pixels.dtype != np.uint8:
        raise RequestError(
            f"The input {INPUT} is {pixels.dtype} of shape {list(pixels.shape)}; it must be UINT8 [batch, height, "
            "width, 3]."
        )
    return list(pixels)


def metres_of(parameters: str) -> Metres:
    """Of a request's parameters, JSON. Raises RequestError."""
    checked = known_parameters(json.loads(parameters or "{}"))
    return read_metres({name: value for name, value in checked.items() if name in METRES})


def outputs_of(requested: Sequence[str], decode: Decode, metres: Metres) -> list[str]:
    """Those to send. A client that names none asks, as Triton tells it, for all that the configuration has; depth is
    then sent where it can be. Raises NotMetricError, RequestError.
    """
    if set(requested) >= set(configured_outputs(decode)):
        return output_names(decode, metres)
    for name in requested:
        require_output(name, decode, metres)
    return list(requested)


def configured_outputs(decode: Decode) -> tuple[str, ...]:
    """What a model's configuration lists."""
    return (*decode.names, "depth") if decode.has("depth") else decode.names
