"""One process of `densegeo serve --ray`: the application that `serve` runs, as a replica of Ray Serve.

Ray's proxies take the connections, and hand each request to one replica's application.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from densegeo.errors import QueueFullError
from densegeo.fleet.ray_cluster import for_process
from densegeo.runtime import Estimator, verified
from densegeo.runtime.tensorfile import read_tensors
from densegeo.runtime.verify import Verdict
from densegeo.runtime.verify import serve as run_stored
from densegeo.serving.command import ServeJob
from densegeo.serving.logs import FIELDS, WARNINGS, start_logging
from densegeo.serving.metrics import ServingMetrics
from densegeo.serving.models import open_models
from densegeo.serving.options import read_token
from densegeo.serving.routes import application
from densegeo.serving.server import HUNG_GRACE_S
from densegeo.serving.service import Deadline, Service
from densegeo.signals import EXIT_HUNG

log = logging.getLogger("densegeo.fleet")

APPLICATION = "densegeo"  # its name in Ray Serve; another command's of this name takes its place
DEPLOYMENT = "replicas"
ANSWER_S = 10.0  # for what one replica asks the others
FIXED = (
    "This server runs on Ray, where models change together in all its processes: say `densegeo serve NEW_BUNDLE --ray "
    "ADDRESS` again, which puts it in the old one's place."
)


@dataclass(frozen=True)
class Deployed:
    """What every replica is told. owner: of the command that deployed it. job: without the token, which is read
    anew in each process. needs: what one takes of its node.
    """

    owner: str
    job: ServeJob
    needs: dict[str, Any]


class Replica:
    """The application over bundles of its own. It takes requests once each bundle gave what it is verified with.

    Raises BundleError, BackendError, ConfigError.
    """

    def __init__(self, deployed: Deployed) -> None:
        start_logging()
        self._scope = ExitStack()
        self._scope.enter_context(WARNINGS.collected())
        job = deployed.job
        self._deployed = deployed
        self._job = replace(job, estimator=for_process(job.estimator, deployed.needs))
        token = None if job.token_file is None else read_token(job.token_file)
        self._options = replace(job.options, token=token)
        self._service = Service(open_models(job.bundles, self._job.opens()), self._hung, FIXED)
        self._metrics = FleetMetrics(self._service)
        self._completed: dict[str, int] = {}
        for model in self._service.models.values():
            model.load()
            with model.lease() as estimator:
                require_verified(model.directory, estimator)
            log.info("loaded", extra={FIELDS: {"model": model.name, "version": model.version}})

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Asked for by Ray Serve when this is made."""
        return _without_id(application(self._service, self._options, self._metrics))

    async def check_health(self) -> None:
        """Asked for by Ray Serve, which replaces a replica for which this raises: every estimator must have given
        results since the last time, or give one now.
        """
        for model in self._service.models.values():
            with model.lease() as estimator:
                earlier = self._completed.get(model.name)
                self._completed[model.name] = estimator.metrics.snapshot().counters["completed"]
                if earlier is not None and self._completed[model.name] > earlier:
                    continue
                try:
                    await self._service.estimate(estimator, [picture(estimator)], Deadline(None, 0.0))
                except QueueFullError:  # one that hangs is found by the requests that wait
                    continue
                self._completed[model.name] += 1

    def deployed(self) -> Deployed:
        """What this replica was told."""
        return self._deployed

    def drain(self) -> None:
        """Say no to `ready`."""
        self._service.draining = True

    def exposition(self) -> tuple[str, bytes]:
        """This replica's name, and its numbers in Prometheus' text format."""
        from ray import serve

        return str(serve.get_replica_context().replica_id.unique_id), self._metrics.exposition()

    def __del__(self) -> None:
        """Called by Ray Serve when what was accepted is answered."""
        if "_service" in self.__dict__ and not self._service.hung:
            self._service.close()
        self._scope.close()

    def _hung(self) -> None:
        """Called in a backend's thread, which cannot be stopped: Ray starts another process."""
        log.error("a backend did not return in time: this process ends", extra={FIELDS: {"exit_code": EXIT_HUNG}})
        logging.shutdown()
        timer = threading.Timer(HUNG_GRACE_S, os._exit, (EXIT_HUNG,))
        timer.daemon = True
        timer.start()


def _without_id(app: ASGIApp) -> ASGIApp:
    """Answers without X-Request-ID, which Ray's proxies add: the same one, which they hand on with the request."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-ID"]
            await send(message)

        await app(scope, receive, send_without_id)

    return wrapped


class FleetMetrics(ServingMetrics):
    """Of one replica; `whole` is of all of them, each with a label `replica`."""

    async def whole(self) -> bytes:
        """Raises TimeoutError where a replica does not answer."""
        from ray import serve

        handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        expositions = await handle.broadcast("exposition").results_async(timeout_s=ANSWER_S)
        return labelled(expositions)


def labelled(expositions: Sequence[tuple[str, bytes]]) -> bytes:
    """Prometheus' texts of several replicas as one: each family once, every sample with its replica's name."""
    families: dict[str, Metric] = {}
    for name, text in expositions:
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    exposition: bytes = generate_latest(registry)
    return exposition


class _Families:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def require_verified(bundle: Path, estimator: Estimator) -> None:
    """Run the bundle's stored pictures as `densegeo verify` does, where that was not done on this machine; a bundle
    without them must give a result at all. Raises BackendError, BundleError.
    """
    samples_file = estimator.manifest.verification.inputs
    if not samples_file:
        estimator(picture(estimator))
    elif not verified.is_verified(bundle, estimator.backend):
        path = bundle / samples_file
        verdict = Verdict(estimator.backend, estimator.device, run_stored(estimator, read_tensors(path), path), [])
        verified.remember(bundle, verdict.backend, verdict.device, "" if verdict.good else verdict.in_words)
        verdict.require_good(bundle)


def picture(estimator: Estimator) -> np.ndarray:
    """(h, w, 3) uint8, grey, of the bundle's smallest size."""
    width, height = min((bucket.size for bucket in estimator.manifest.buckets), key=lambda size: size.pixels)
    return np.full((height, width, 3), 128, np.uint8)
