"""A server on a free port of this machine, in a thread of this process or in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from densegeo.runtime import Estimator
from densegeo.serving.models import open_models
from densegeo.serving.options import Options
from densegeo.serving.routes import application
from densegeo.serving.server import Server, listen
from densegeo.serving.service import Service

Opens = Callable[[Path], Estimator]


class Served:
    """url: where it answers. service: what is behind it. server: the process's part, which a test may stop."""

    def __init__(self, bundles: list[Path], opens: Opens, options: Options) -> None:
        self.service = Service(open_models(bundles, opens))
        for model in self.service.models.values():
            model.load()
        bound = listen(options.host, options.port)
        self.server = Server(application(self.service, options), self.service, options)
        self.port: int = bound.getsockname()[1]
        self.url = f"{'http' if options.tls_key is None else 'https'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, args=([bound],), daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def wait(self, timeout: float = 30.0) -> bool:
        """Whether the server has ended by itself."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End it; what was accepted is answered first."""
        self.server.should_exit = True
        assert self.wait(), "the server did not end"
        if not self.service.hung:
            self.service.close()


@contextmanager
def served(bundle: Path | list[Path], opens: Opens | None = None, **options: Any) -> Iterator[Served]:
    """A server in a thread over one bundle or several. opens: how, by default with ONNX Runtime."""
    bundles = bundle if isinstance(bundle, list) else [bundle]
    chosen = Options(port=0, **({"drain_s": 0.0} | options))
    server = Served(bundles, opens or (lambda directory: Estimator(directory, device="cpu", timeout_s=60.0)), chosen)
    try:
        yield server
    finally:
        server.close()


class Started:
    """`densegeo serve` in a process of its own. log: its lines so far; wait ends with the code it exited with.

    port: 0 for any. within_s: seconds until it serves.
    """

    def __init__(self, *arguments: str | Path, port: int = 0, within_s: float = 60.0, **environment: str) -> None:
        command = [sys.executable, "-m", "densegeo", "serve", *map(str, arguments), "--port", str(port)]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
        self.log: list[dict[str, Any]] = []
        self._there = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._there.wait(within_s), f"the server did not start: {self.log}"
        lines = [line for line in self.log if line["message"] == "serving"]
        assert lines, self.log
        self.url: str = lines[0]["url"]

    def end(self, signal: int, timeout: float = 60.0) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(signal)
        return self.wait(timeout)

    def wait(self, timeout: float = 60.0) -> int:
        """The exit code, when all of its log has been read."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line) if line.startswith("{") else {"message": line})
            if self.log[-1]["message"] == "serving":
                self._there.set()
        self._there.set()


@contextmanager
def started(*arguments: str | Path, port: int = 0, within_s: float = 60.0, **environment: str) -> Iterator[Started]:
    """The same, killed at the end if it still runs."""
    server = Started(*arguments, port=port, within_s=within_s, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()


def metrics(url: str, **headers: str) -> dict[str, float]:
    """The server's numbers: "name{labels}" -> value."""
    text = httpx.get(f"{url}/metrics", headers=headers).raise_for_status().text
    rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


def until(true: Callable[[], object], event: str, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, event
        time.sleep(0.01)
