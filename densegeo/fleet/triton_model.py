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
class _Asked:
    """One request. images: (h, w, 3) uint8. error: why it cannot be answered, or None so far."""

    request: Any
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
        return str(self.request.request_id())


class TritonPythonModel:
    """What Triton's Python backend calls, in one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside this version's `model.py`. Raises BundleError, BackendError, ConfigError."""
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        start_logging()
        self._heard = contextlib.ExitStack()
        self._heard.enter_context(WARNINGS.collected())
        config = json.loads(args["model_config"])
        options = read_options(config)
        directory = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        device = device_of(args["model_instance_kind"], args["model_instance_device_id"])
        most = max(1, int(config["max_batch_size"]))
        self._estimator = Estimator(
            directory,
            options.backend,
            device,
            threads=options.threads,
            timeout_s=options.timeout_s,
            max_pixels=options.max_pixels,
            max_batch=most,
            max_queue=most,
            keep_replaced=True,
        )
        facts = {"model": args["model_name"], "version": args["model_version"], "device": self._estimator.device}
        log.info("loaded", extra={FIELDS: facts})

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request. What one request has wrong is its own error, and no other's."""
        asked = [self._read(request) for request in requests]
        for one in asked:  # all before the first is waited for, so that they run together
            self._guarded(one, self._submit)
        responses = [self._respond(one) for one in asked]
        if any(isinstance(one.error, BackendTimeoutError) for one in asked):
            self._leave()
        return responses

    def finalize(self) -> None:
        """Release the bundle."""
        self._estimator.close()
        self._heard.close()

    def _read(self, request: Any) -> _Asked:
        asked = _Asked(request)
        self._guarded(asked, self._understand)
        return asked

    def _understand(self, asked: _Asked) -> None:
        decode = self._estimator.manifest.decode
        tensor = self._triton.get_input_tensor_by_name(asked.request, INPUT)
        asked.images = images_of(tensor.as_numpy())
        asked.metres = metres_of(asked.request.parameters())
        asked.outputs = outputs_of(asked.request.requested_output_names(), decode, asked.metres)
        asked.metres.rehearse(decode)
        microseconds = asked.request.timeout()
        asked.deadline_ms = microseconds / 1e3 if microseconds else None

    def _submit(self, asked: _Asked) -> None:
        if asked.request.is_cancelled():
            raise CancelledError
        for image in asked.images:
            asked.futures.append(self._estimator.submit(image, deadline_ms=asked.deadline_ms))

    def _respond(self, asked: _Asked) -> Any:
        tensors: list[Any] = []

        def collect(asked: _Asked) -> None:
            geometries = [asked.metres.apply(future.result()) for future in asked.futures]
            for name in asked.outputs:
                maps = np.stack([getattr(geometry, name) for geometry in geometries])
                tensors.append(self._triton.Tensor(name, np.ascontiguousarray(maps, np.float32)))

        self._guarded(asked, collect)
        if asked.warnings:
            log.warning("warned", extra={FIELDS: {"request_id": asked.id, "warnings": asked.warnings}})
        if asked.error is None:
            return self._triton.InferenceResponse(tensors)
        for future in asked.futures:
            future.cancel()
        return self._triton.InferenceResponse([], self._error(asked))

    def _guarded(self, asked: _Asked, call: Any) -> None:
        """Call with the request unless it has failed; what is raised is its error."""
        if asked.error is not None:
            return
        try:
            with WARNINGS.about(asked.id) as texts:
                call(asked)
        except (Exception, CancelledError) as error:
            asked.error = error
        asked.warnings += [text for text in texts if text not in asked.warnings]

    def _error(self, asked: _Asked) -> Any:
        error = asked.error
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
    known = known_parameters(json.loads(parameters or "{}"))
    return read_metres({name: value for name, value in known.items() if name in METRES})


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
