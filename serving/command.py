"""`densegeo serve`: bundles over HTTP."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from densegeo.arguments import Backend, Device, Number, Ray, Whole, above_zero, find_bundle, not_negative
from densegeo.errors import ConfigError
from densegeo.runtime import Estimator
from densegeo.serving.logs import FIELDS, WARNINGS, start_logging
from densegeo.serving.models import Open, open_models
from densegeo.serving.options import MAX_PIXELS, MIB, Options, read_token
from densegeo.serving.replicas import Replicas, replicas_of
from densegeo.serving.routes import application
from densegeo.serving.server import Server, check_tls, listen
from densegeo.serving.service import Service
from densegeo.signals import EXIT_HUNG

log = logging.getLogger("densegeo.serving")


@dataclass(frozen=True)
class ServeJob:
    """What the command line asked for. estimator: options of `Estimator`. token_file: where the options' token is from.
    replicas: of Ray, or None for this process alone.
    """

    bundles: list[Path]
    estimator: dict[str, Any]
    options: Options
    token_file: Path | None = None
    replicas: Replicas | None = None

    def opens(self) -> Open:
        """How bundles are opened: a replaced one goes on with what it has in memory."""
        return partial(Estimator, **self.estimator, keep_replaced=True)


# `Optional` and not `| None`: typer evaluates these at run time, also on Python 3.10.
def serve(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            parser=find_bundle, metavar="BUNDLE...", help="Directories, each served under its own name; or fe2e-tiny."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine alone can connect.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, which the log says.")] = 8000,
    backend: Backend = "auto",
    device: Device = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Waiting images of one size that are run together.")] = 8,
    max_wait_ms: Annotated[
        float, typer.Option(callback=not_negative, help="How long the first of them waits for others.")
    ] = 0.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that may wait; more are answered with 503.")] = 64,
    threads: Annotated[
        Whole, typer.Option(min=1, help="Of the CPU, for the networks; by default the backend's library decides.")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            callback=above_zero,
            help=f"Seconds for one run; a backend that takes longer ends the process with {EXIT_HUNG}.",
        ),
    ] = 60.0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request, unpacked.")] = 64 * MIB,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture; larger ones are not decoded.")] = MAX_PIXELS,
    max_requests: Annotated[int, typer.Option(min=1, help="Answered at once; more get 503.")] = 128,
    body_timeout: Annotated[
        float, typer.Option(callback=above_zero, help="Seconds in which a request's body must arrive.")
    ] = 30.0,
    drain: Annotated[
        float,
        typer.Option(
            callback=not_negative,
            help="Seconds after SIGTERM in which requests are still taken while `ready` says no.",
        ),
    ] = 1.0,
    token_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A file with the token that requests must carry: `Authorization: Bearer TOKEN`."),
    ] = None,
    tls_certificate: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="PEM file of the certificate chain; goes with --tls-key."),
    ] = None,
    tls_key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="PEM file of the certificate's key."),
    ] = None,
    allow_origin: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="An origin whose pages may ask, such as https://example.org; repeat it."),
    ] = None,
    allow_host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A further name by which this machine is called on a loopback address; repeat it."),
    ] = None,
    ray: Ray = None,
    min_replicas: Annotated[Whole, typer.Option(min=1, help="Processes of Ray at least; by default 1.")] = None,
    max_replicas: Annotated[
        Whole, typer.Option(min=1, help="Processes of Ray at most; by default as many as --min-replicas.")
    ] = None,
    target_requests: Annotated[
        Number, typer.Option(help="Requests a process, on average, from which on Ray adds processes; by default 4.")
    ] = None,
    replica_cpus: Annotated[Whole, typer.Option(min=1, help="CPUs of each process of Ray; by default 1.")] = None,
) -> None:
    """Answer over HTTP: the KServe v2 protocol, POST /v1/geometry, and a page at /."""
    job = job_of(**locals())
    start_logging()
    if job.replicas is not None:
        from densegeo.fleet.ray_serving import run_on_ray

        sys.exit(run_on_ray(job))
    sys.exit(run(job.bundles, job.opens(), job.options))


def job_of(
    bundles: list[Path],
    host: str,
    port: int,
    backend: str,
    device: str,
    max_batch: int,
    max_wait_ms: float,
    max_queue: int,
    threads: int | None,
    timeout: float,
    max_body: int,
    max_pixels: int,
    max_requests: int,
    body_timeout: float,
    drain: float,
    token_file: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    allow_origin: list[str] | None,
    allow_host: list[str] | None,
    **of_ray: Any,
) -> ServeJob:
    """The command line, checked. Raises BadParameter."""
    estimator = {"backend": backend, "device": device, "max_pixels": max_pixels, "max_batch": max_batch}
    estimator |= {"max_wait_ms": max_wait_ms, "max_queue": max_queue, "timeout_s": timeout, "threads": threads}
    try:
        options = Options(
            host=host,
            port=port,
            token=None if token_file is None else read_token(token_file),
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            origins=frozenset(allow_origin or ()),
            hosts=frozenset(name.lower() for name in allow_host or ()),
            max_body=max_body,
            max_pixels=max_pixels,
            max_requests=max_requests,
            body_s=body_timeout,
            drain_s=drain,
        )
        check_tls(options)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    job = ServeJob(bundles, estimator, options, token_file, replicas_of(**of_ray, port=port, device=device))
    try:
        open_models(bundles, job.opens())
    except ConfigError as error:  # names
        raise typer.BadParameter(str(error), param_hint="BUNDLE") from error
    return job


def run(bundles: list[Path], opens: Open, options: Options) -> int:
    """Serve until told to end; the code that the process should end with. Raises ConfigError, BundleError ..."""
    service = Service(open_models(bundles, opens))
    bound = listen(options.host, options.port)
    server = Server(application(service, options), service, options)
    for model in service.models.values():
        model.load()
        log.info("loaded", extra={FIELDS: {"model": model.name, "version": model.version}})
    with WARNINGS.collected():
        server.run([bound])
    if service.hung:  # its thread cannot be stopped, and must not meet the interpreter's end
        logging.shutdown()
        os._exit(EXIT_HUNG)
    service.close()
    log.info("ended", extra={FIELDS: {"exit_code": server.exit_code}})
    return server.exit_code
