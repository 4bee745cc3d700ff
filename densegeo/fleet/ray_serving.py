"""`densegeo serve --ray`: the server as an application of Ray Serve, deployed, watched over, replaced and ended.

A command that finds the application running puts its own in its place: Ray starts one replica more, which verifies its
bundles, then ends one of the old ones when what it has accepted is answered, and so on. When the new ones do not start,
what ran before is deployed again, whose replicas have gone on meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from densegeo.errors import BackendError, ConfigError
from densegeo.fleet.ray_cluster import LOCAL, connected, resources, share
from densegeo.fleet.ray_replica import APPLICATION, DEPLOYMENT, Deployed, Replica
from densegeo.serving.command import ServeJob, job_of
from densegeo.serving.logs import FIELDS
from densegeo.serving.models import open_models, require_own
from densegeo.serving.replicas import REPLICA, Replicas
from densegeo.serving.server import EXIT_INTERRUPTED, listen
from densegeo.signals import Terminated, ending_on_signal

log = logging.getLogger("densegeo.fleet")

STEP_S = 0.5  # between looks at what Ray says
SAY_S = 30.0  # between lines in the log while Ray is waited for
OWNER_S = 5.0  # between looks at whose application it is
HEALTH_S = 10.0  # between health checks of a replica
HEALTH_GRACE_S = 30.0  # for a health check beside the run that it may wait for
END_S = 30.0  # for a replica that was told to end, beside what it has accepted
PROXY_S = "120"  # for one of Ray's proxies to start, on a machine as busy as any
STARTS = 2  # tries of a replica that does not start


def run_on_ray(job: ServeJob) -> int:
    """Serve until told to end, or until another command's application has taken this one's place; the exit code.

    Raises ConfigError where there is no cluster or no room, BundleError for a bundle that others could have written,
    BackendError when the replicas do not start.
    """
    replicas = job.replicas
    assert replicas is not None
    for model in open_models(job.bundles, job.opens()).values():
        require_own(model.directory)
    # One more than there are to be takes part while a bundle is replaced.
    ended: list[KeyboardInterrupt] = []
    with (
        connected(replicas.address, (replicas.max_replicas + 1) * replicas.cpus) as ray,
        ending_on_signal(ended.append),
    ):
        needs, fit = share(resources(ray), str(job.estimator["device"]), replicas.cpus, REPLICA)
        if replicas.min_replicas > fit:
            raise ConfigError(f"{fit} replicas fit into this cluster: say a smaller --min-replicas, or add nodes.")
        fleet = _Fleet(ray, job, replicas, ended)
        deployed = Deployed(secrets.token_hex(8), _for_replicas(job), needs)
        return fleet.run(deployed)


class _Fleet:
    """The application of a cluster, and this command's part in it. ended: gets the signal that ends the command."""

    def __init__(self, ray: Any, job: ServeJob, replicas: Replicas, ended: list[KeyboardInterrupt]) -> None:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._ray, self._ended = ray, ended
        self._serve: Any = serve
        self._job, self._replicas = job, replicas

    def run(self, deployed: Deployed) -> int:
        """Deploy, and serve until told to end or replaced; the exit code. Raises ConfigError, BackendError."""
        self._start_proxies()
        previous = self._previous()
        try:
            self._deploy(deployed)
            self._wait(deployed)
        except BaseException as error:
            self._undo(previous)
            if isinstance(error, _EndedError):
                return self._code()
            raise
        url = f"{'http' if self._job.options.tls_key is None else 'https'}://{_host(self._job)}"
        fields = {"url": url, "models": [bundle.name for bundle in self._job.bundles]}
        log.info("serving", extra={FIELDS: fields | {"instead": previous is not None}})
        self._watch(deployed)
        local = self._replicas.address == LOCAL
        if not (local or (self._owns(deployed) and self._state() != "DEPLOYING")):  # which another command does
            log.info("ended: another command's application has taken this one's place")
            return self._code() if self._ended else 0
        self._drain()
        log.info("ended", extra={FIELDS: {"exit_code": self._code()}})
        return self._code()

    def _start_proxies(self) -> None:
        """Ray's own processes that listen, one a node, where they do not run. Raises ConfigError where this machine's
        port is taken, or where they listen elsewhere.
        """
        options = self._job.options
        files = {"ssl_certfile": options.tls_certificate, "ssl_keyfile": options.tls_key}
        http: dict[str, Any] = {"host": options.host, "port": options.port}
        http |= {name: str(path) for name, path in files.items() if path is not None}
        try:
            self._ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        except ValueError:
            listen(options.host, options.port).close()
        start_timeout = {"runtime_env": {"env_vars": {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": PROXY_S}}}
        with contextlib.suppress(self._ray.exceptions.RayActorError, TimeoutError):  # slow: Ray starts another one
            self._serve.start(proxy_location="EveryNode", http_options=http, controller_options=start_timeout)
        listening = self._serve.context._get_global_client().http_config
        if (listening.host, listening.port) != (options.host, options.port):
            raise ConfigError(
                f"Ray Serve listens on {listening.host}:{listening.port} in this cluster already: "
                f"say --host {listening.host} --port {listening.port}, or end it with `serve shutdown`."
            )

    def _previous(self) -> Deployed | None:
        """What the replicas were told that run now. Raises ConfigError where there are some that do not say it."""
        status = self._status()
        if status is None or not any(
            replicas.replica_states.get("RUNNING") for replicas in status.deployments.values()
        ):
            return None
        running = self._running()
        if running is None:
            raise ConfigError(
                f"An application called {APPLICATION} runs in this cluster and does not say what it serves. It is busy "
                "or not of `densegeo serve`: try again, or end it with `serve shutdown`."
            )
        return running

    def _running(self) -> Deployed | None:
        """What a replica was told; None where none says it."""
        try:
            handle = self._serve.get_app_handle(APPLICATION)
            deployed = handle.deployed.remote().result(timeout_s=HEALTH_GRACE_S)
        except (TimeoutError, self._serve.exceptions.RayServeException, self._ray.exceptions.RayError):
            return None  # all busy, or the one that was asked has just died
        return deployed if isinstance(deployed, Deployed) else None

    def _deploy(self, deployed: Deployed) -> None:
        """Raises ConfigError where another application has the address."""
        target = self._serve.RunTarget(target=application(deployed), name=APPLICATION, route_prefix="/")
        try:
            self._serve.run_many([target], wait_for_applications_running=False)
        except self._serve.exceptions.RayServeException as error:
            raise ConfigError(f"Ray Serve does not take the application: {error}") from error

    def _wait(self, deployed: Deployed) -> None:
        """Until the application is what was deployed. Raises BackendError, _EndedError."""
        logged_at = time.monotonic()
        while True:
            if self._ended:
                raise _EndedError
            status, state = self._status(), self._state()
            running = self._running() if state == "RUNNING" and self._listening() else None
            if running is not None and running.owner == deployed.owner:
                return
            if status is None or state == "DELETING":
                raise BackendError("Another command has ended the application.")
            if state == "DEPLOY_FAILED":
                raise BackendError(f"The replicas do not start with {_names(deployed)}: {_reason(status)}")
            if time.monotonic() - logged_at > SAY_S:
                logged_at = time.monotonic()
                log.info("waiting for replicas", extra={FIELDS: {"why": _reason(status)}})
            time.sleep(STEP_S)

    def _undo(self, previous: Deployed | None) -> None:
        """What there was before this command: it is deployed anew, and waited for unless this is told to end."""
        if previous is not None:
            log.warning("going on with what was served before", extra={FIELDS: {"bundles": _names(previous)}})
            self._deploy(previous)
            with contextlib.suppress(_EndedError):
                self._wait(previous)
        else:
            self._remove()

    def _remove(self) -> None:
        """The application, when what was accepted is answered; and Ray Serve, when nothing else runs there."""
        if self._status() is not None:
            self._serve.delete(APPLICATION)
        if not self._serve.status().applications:
            self._serve.shutdown()

    def _watch(self, deployed: Deployed) -> None:
        """Until told to end, or until the application is another command's."""
        checked_at = time.monotonic()
        while not self._ended:
            time.sleep(STEP_S)
            if time.monotonic() - checked_at >= OWNER_S:
                checked_at = time.monotonic()
                if self._replicas.address != LOCAL and not self._owns(deployed):  # whose Ray it is, stays
                    return

    def _owns(self, deployed: Deployed) -> bool:
        """Whether the application is not another command's, as far as is known."""
        state = self._state()
        running = self._running() if state == "RUNNING" else None
        return bool(state) and (running is None or running.owner == deployed.owner)

    def _drain(self) -> None:
        """Say no to `ready`, go on for `drain_s`, take no more, finish what was accepted."""
        name = "SIGTERM" if isinstance(self._ended[0], Terminated) else "SIGINT"
        log.info("ending: finishing what was accepted", extra={FIELDS: {"signal": name}})
        if self._status() is not None:
            with contextlib.suppress(TimeoutError, self._ray.exceptions.RayError):  # of a replica that has just died
                self._serve.get_app_handle(APPLICATION).broadcast("drain").results(timeout_s=HEALTH_GRACE_S)
            time.sleep(self._job.options.drain_s)
        self._remove()

    def _code(self) -> int:
        return 0 if isinstance(self._ended[0], Terminated) else EXIT_INTERRUPTED

    def _listening(self) -> bool:
        """Whether one of Ray's proxies answers."""
        return any(proxy.value == "HEALTHY" for proxy in self._serve.status().proxies.values())

    def _state(self) -> str:
        """Of the application, as Ray Serve calls it; empty where there is none."""
        status = self._status()
        return "" if status is None else str(status.status.value)

    def _status(self) -> Any:
        """Of the application; None where there is none. Raises BackendError."""
        try:
            return self._serve.status().applications.get(APPLICATION)
        except self._ray.exceptions.RayError as error:
            raise BackendError(f"The Ray cluster does not answer any more: {error}") from error


class _EndedError(Exception):
    """Told to end while replicas were waited for."""


def application(deployed: Deployed) -> Any:
    """The application, to be run by Ray Serve."""
    from ray import serve

    job, replicas = deployed.job, deployed.job.replicas
    assert replicas is not None
    options, estimator = job.options, job.estimator
    scaling = {"min_replicas": replicas.min_replicas, "max_replicas": replicas.max_replicas}
    decorated: Any = serve.ingress()(Replica)
    deployment: Any = serve.deployment(
        decorated,
        name=DEPLOYMENT,
        ray_actor_options=deployed.needs,
        autoscaling_config=scaling | {"target_ongoing_requests": replicas.target},
        # The rest waits in the proxies, for whichever replica is free first.
        max_ongoing_requests=min(options.max_requests, estimator["max_queue"]),
        max_queued_requests=options.max_requests,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=estimator["timeout_s"] + HEALTH_GRACE_S,
        graceful_shutdown_timeout_s=options.body_s + estimator["timeout_s"] + END_S,
        graceful_shutdown_wait_loop_s=STEP_S,
        max_constructor_retry_count=STARTS,
        max_surge_percent=1,  # rounded up: one
    )
    return deployment.bind(deployed)


def build(args: Mapping[str, str]) -> Any:
    """The application for a config file of Ray Serve, as KubeRay's RayService has one.

    args: `serve`, what would stand behind `densegeo serve` on a command line. Host and port are the config file's.
    """
    import typer

    from densegeo.serving.command import serve

    holder = typer.Typer(add_completion=False)
    holder.command("serve")(serve)
    context = typer.main.get_command(holder).make_context("serve", [*shlex.split(args["serve"]), "--ray", "auto"])
    job = job_of(**context.params)
    replicas = job.replicas
    assert replicas is not None
    import ray

    needs, _ = share(resources(ray), str(job.estimator["device"]), replicas.cpus, REPLICA)
    return application(Deployed("config file", _for_replicas(job), needs))


def _for_replicas(job: ServeJob) -> ServeJob:
    """Absolute paths, and no token."""
    file = None if job.token_file is None else job.token_file.absolute()
    bundles = [bundle.absolute() for bundle in job.bundles]
    return replace(job, bundles=bundles, token_file=file, options=replace(job.options, token=None))


def _host(job: ServeJob) -> str:
    host = job.options.host
    return f"{f'[{host}]' if ':' in host else host}:{job.options.port}"


def _names(deployed: Deployed) -> str:
    return ", ".join(str(bundle) for bundle in deployed.job.bundles)


def _reason(status: Any) -> str:
    """What Ray says of an application and its replicas, in one line: the last line of a traceback says what it was."""
    texts = [replicas.message for replicas in status.deployments.values() if replicas.message] or [status.message]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    error_lines = [line for line in lines if line.startswith("densegeo.errors.")]
    return (error_lines[-1].partition(": ")[2] if error_lines else " ".join(lines))[:2000]
