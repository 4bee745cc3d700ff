"""The tritonserver of nvidia-pytriton's wheel, started on a repository; runs in the environment that has the wheel."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.support.project import ROOT

SITE = Path(sysconfig.get_paths()["purelib"])
HOME = SITE / "pytriton" / "tritonserver"
STUB = "triton_python_backend_stub"


class Server:
    """http, grpc: clients of it. log: its file."""

    def __init__(self, repository: Path, log: Path, **environment: str) -> None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = HOME / "backends" / "python" / STUB
        if not stub.exists():
            shutil.copy2(HOME / "python_backend_stubs" / version / STUB, stub)
            stub.chmod(0o755)
        ports = {kind: _free_port() for kind in ("http", "grpc")}
        command = [HOME / "bin" / "tritonserver", "--model-repository", repository, "--allow-metrics=false"]
        command += ["--backend-directory", HOME / "backends", "--model-control-mode=explicit", "--exit-on-error=false"]
        command += ["--exit-timeout-secs=2"]  # for instances whose process is dead
        command += ["--disable-auto-complete-config"]  # which takes a second a model; ours are complete
        for kind, port in ports.items():
            command += [f"--{kind}-port={port}", f"--{kind}-address=127.0.0.1"]
        libraries = [str(SITE / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        variables = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            # The interpreter in the model's process asks PATH where it is installed, and not PYTHONPATH for more.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.log, self._out = log, log.open("w")
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self._out, stderr=subprocess.STDOUT, env=variables, cwd=ROOT
        )
        self.grpc_url = f"127.0.0.1:{ports['grpc']}"
        self.http = tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports['http']}", concurrency=16)
        self.grpc = tritonclient.grpc.InferenceServerClient(self.grpc_url)
        self._wait()

    def stubs(self, model: str) -> list[psutil.Process]:
        """The processes of a model's instances that run; one that has ended stays a zombie until Triton looks."""
        actual = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if f"/{model}/" in " ".join(child.cmdline()):
                    actual.append(child)
        return actual

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def live(self) -> bool:
        """Whether it runs and says so."""
        return self.process.poll() is None and bool(self.http.is_server_live())

    def close(self) -> None:
        """End it."""
        self.http.close()
        self.grpc.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._out.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.http.is_server_live() and self.grpc.is_server_live():
                    return
            except (OSError, InferenceServerException):
                pass
            time.sleep(0.05)
        raise AssertionError(f"tritonserver did not start: {self.text()[-3000:]}")


@contextlib.contextmanager
def server(repository: Path, log: Path, **environment: str) -> Iterator[Server]:
    """A server that is ended."""
    started = Server(repository, log, **environment)
    try:
        yield started
    finally:
        started.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
