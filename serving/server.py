"""The process around the application: sockets, connections that stall, signals, and the code it ends with."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from densegeo.errors import ConfigError, ResourceError
from densegeo.serving.logs import FIELDS
from densegeo.serving.options import Options
from densegeo.serving.service import Service
from densegeo.signals import EXIT_HUNG

log = logging.getLogger("densegeo.serving")

EXIT_INTERRUPTED = 130
LINGER_S = 0.5  # how long an unused connection is kept at the end: a request may be on its way
HUNG_GRACE_S = 1.0  # how long `ready` says no before the process ends, so that answers go out and a probe sees it


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ResourceError where that cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ResourceError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. Choose another --host or --port."
        ) from error
    return bound


def check_tls(options: Options) -> None:
    """Raises ConfigError that names the file, and never asks for a password."""
    if options.tls_certificate is None or options.tls_key is None:
        return
    for option, path in (("--tls-certificate", options.tls_certificate), ("--tls-key", options.tls_key)):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{option} {path} cannot be read: {error.strerror or error}.") from error
        label = b"CERTIFICATE" if option == "--tls-certificate" else b"PRIVATE KEY"
        if b"-----BEGIN " not in text or label not in text:
            raise ConfigError(f"{option} {path} is no PEM file with a {label.decode().lower()}.")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.tls_certificate, options.tls_key, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or str(error)
        if reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-key {options.tls_key} is not the key of {options.tls_certificate}.") from error
        raise ConfigError(
            f"--tls-certificate {options.tls_certificate} and --tls-key {options.tls_key} cannot be used: {reason}. "
            "They are PEM files, the key without a password."
        ) from error


class Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT after what was accepted is answered, at the second signal at once.

    sockets: those to take connections from. exit_code: what the process should end with.
    """

    def __init__(self, app: Any, service: Service, options: Options) -> None:
        check_tls(options)
        config = uvicorn.Config(
            app,
            http=_protocol(options),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=max(1, round(options.idle_s)),
            limit_concurrency=options.max_connections,
            backlog=2048,
            ssl_certfile=options.tls_certificate,
            ssl_keyfile=options.tls_key,
        )
        config.load()
        super().__init__(config)
        self.exit_code = 0
        self._service, self._options = service, options
        service.on_hang = self._hung
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the process by the signal itself."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.remove_signal_handler(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Say no to `ready`, go on for `drain_s`, take no more connections, finish, end. Called again: end now."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        log.info("ending: finishing what was accepted", extra={FIELDS: {"signal": signal.Signals(number).name}})
        if number == signal.SIGINT:
            self.exit_code = EXIT_INTERRUPTED
        assert self._loop is not None
        self._loop.call_later(self._options.drain_s, self._end)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it answers once it does."""
        await super().startup(sockets)
        if sockets:
            scheme = "http" if self._options.tls_certificate is None else "https"
            host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
            url = f"{scheme}://{host}:{sockets[0].getsockname()[1]}"
            log.info("serving", extra={FIELDS: {"url": url, "models": list(self._service.models)}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take the connections that the system has made already, then no more; finish."""
        loop, accepted = asyncio.get_running_loop(), []
        for listener in sockets or []:
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        for connection in accepted:
            connection.setblocking(False)
            with contextlib.suppress(OSError):  # its client has gone
                await loop.connect_accepted_socket(self._connection, connection, ssl=self.config.ssl)
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state={}
        )
        return protocol

    def _hung(self) -> None:
        """Called in a backend's thread."""
        log.error("a backend did not return in time: this process ends", extra={FIELDS: {"exit_code": EXIT_HUNG}})
        self.exit_code = EXIT_HUNG
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, HUNG_GRACE_S, self._end)

    def _end(self) -> None:
        self.should_exit = True


def _protocol(options: Options) -> type[H11Protocol]:
    """HTTP/1.1 connections that are closed when their client stalls."""

    class Connection(H11Protocol):
        """uvicorn's, with a time for a request's head and a time for the client to take an answer."""

        _head: asyncio.TimerHandle | None = None
        _write: asyncio.TimerHandle | None = None

        @property
        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head = self.loop.call_later(options.header_s, self._stalled)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._answering and self._head is not None:
                self._head.cancel()
                self._head = None
            elif not self._answering and self._head is None:
                self._head = self.loop.call_later(options.header_s, self._stalled)

        def shutdown(self) -> None:
            """The server ends: what is being answered is finished, and who may be about to ask is waited for."""
            if self._answering:
                super().shutdown()
            else:
                self.loop.call_later(LINGER_S, self._leave)

        def _leave(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write = self.loop.call_later(options.write_s, self._stalled)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write is not None:
                self._write.cancel()
                self._write = None

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._head, self._write):
                if timer is not None:
                    timer.cancel()

        def _stalled(self) -> None:
            self.transport.abort()

    return Connection
