"""A server on this machine that speaks as much of the Hub's protocol, and of GitHub's raw files, as downloads need."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol


class Content(Protocol):
    """What a path holds."""

    etag: str

    def __len__(self) -> int: ...

    def pieces(self, start: int, largest: int) -> Iterator[bytes]:
        """The bytes from `start` on."""
        ...


class Stored:
    """A file's content, read once: it may change."""

    def __init__(self, path: Path) -> None:
        self._bytes = path.read_bytes()
        self.etag = hashlib.sha256(self._bytes).hexdigest()

    def __len__(self) -> int:
        return len(self._bytes)

    def pieces(self, start: int, largest: int) -> Iterator[bytes]:
        for begin in range(start, len(self._bytes), largest):
            yield self._bytes[begin : begin + largest]


@dataclass
class Hub:
    """files: path below a repository ("exander/FE2E/LDRN.safetensors") -> content. What follows are its faults."""

    files: dict[str, Path | Content] = field(default_factory=dict)
    break_after: dict[str, int] = field(default_factory=dict)  # bytes after which an answer ends, once each
    pause: float = 0.0  # seconds between chunks
    chunk: int = 1 << 20
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    address: str = ""
    tokens: set[str] = field(default_factory=set)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0].lstrip("/")
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            hub.tokens.add(self.headers.get("Authorization", ""))
            on_hub = re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            on_github = re.fullmatch(r"([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path)
            match = on_hub or on_github
            file = hub.files.get(f"{match[1]}/{match[3]}") if match else None
            if file is None or match is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = Stored(file) if isinstance(file, Path) else file
            start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])  # type: ignore[index]
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{content.etag}"')
            self.send_header("X-Repo-Commit", match[2])
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                self.send(path, content.pieces(start, hub.chunk))

        def send(self, path: str, pieces: Iterator[bytes]) -> None:
            limit = hub.break_after.pop(path, None)
            sent = 0
            for piece in pieces:
                if limit is not None and sent >= limit:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(piece)
                sent += len(piece)
                time.sleep(hub.pause)

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the client was killed, or this broke off on purpose
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
