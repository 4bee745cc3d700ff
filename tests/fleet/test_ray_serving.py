"""`densegeo serve --ray` on a cluster of this machine, under load while a replica dies and a bundle is replaced."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.support.grey_requests import HEADER, level_in, other_version, pixels, request
from tests.support.project import ROOT
from tests.support.ray_nodes import environment, running
from tests.support.serving import Started, metrics, started
from tests.support.toy_bundle import make_toy_bundle

CLIENTS = 4
REPLICAS = 2
WITHIN_S = 280.0  # for Ray's processes to start, on a machine as busy as any
PAUSE_S = 0.05  # of a client between two requests
MOST = 10_000  # requests of a client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def replicas() -> list[psutil.Process]:
    """Ray names their processes after what they run."""
    actual = psutil.process_iter(["cmdline"])
    return [process for process in actual if "ServeReplica:densegeo" in " ".join(process.info["cmdline"] or ())]


@dataclass
class Answer:
    """status: 0 where the connection broke. asked, ended: seconds of time.monotonic. again: of a second try."""

    status: int
    asked: float
    ended: float
    version: str = ""
    again: int | None = None


@dataclass
class Load:
    """Clients that ask one after the other until they are stopped; a request that failed is tried once more."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask, args=(index,)) for index in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def since(self, moment: float) -> list[Answer]:
        return [answer for answer in self.answers if answer.asked >= moment]

    def lost(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    def wait_for(self, more: int) -> None:
        """Until so many more requests have been answered."""
        expected, deadline = len(self.answers) + more, time.monotonic() + WITHIN_S
        while len(self.answers) < expected:
            assert time.monotonic() < deadline, Counter(answer.status for answer in self.answers)
            time.sleep(0.05)

    def _ask(self, index: int) -> None:
        level = 0.4 + 0.05 * index
        with httpx.Client(timeout=120) as client:
            for _ in range(MOST):
                if self._stop.is_set():
                    return
                answer = self._once(client, level)
                if answer.status != 200 and not self._stop.is_set():
                    answer.again = self._once(client, level).status
                self.answers.append(answer)
                time.sleep(PAUSE_S)

    def _once(self, client: httpx.Client, level: float) -> Answer:
        body, headers = request(pixels(level))
        asked = time.monotonic()
        try:
            got = client.post(f"{self.url}/v2/models/toy/infer", content=body, headers=headers)
        except httpx.TransportError:
            return Answer(0, asked, time.monotonic())
        answer = Answer(got.status_code, asked, time.monotonic())
        if got.status_code == 200:
            assert abs(level_in(got) - level) < 0.01, "another request's answer"
            answer.version = json.loads(got.content[: int(got.headers[HEADER])])["model_version"]
        return answer


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(REPLICAS + 1) as cluster:  # and one that starts before an old one ends
        yield cluster.address


def version_of(key: str) -> str:
    return key * 12


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of one name and three versions: "old", "new", and "damaged", a file of which its digest denies."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"old": make_toy_bundle(folder / "old" / "toy")}
    for name, key in (("new", "b"), ("damaged", "c")):
        made[name] = folder / name / "toy"
        shutil.copytree(made["old"], made[name])
        other_version(made[name], key)
    graph = next(made["damaged"].glob("denoiser*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    return made


def serve(bundle: Path, address: str, port: int, *more: str) -> Any:
    return started(bundle, "--ray", address, *more, port=port, within_s=WITHIN_S, **environment())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_load_while_a_replica_dies_and_the_bundle_is_replaced(address: str, toys: dict[str, Path]) -> None:
    """A replica that is killed takes what it was answering with it, as Ray's documentation says, and nothing else; what
    is tried again is answered. Replacement, also one that fails, and the end lose nothing.
    """
    port, expected = free_port(), ("--min-replicas", str(REPLICAS))
    with serve(toys["old"], address, port, *expected) as first, Load(first.url) as load:
        load.wait_for(100)
        assert {answer.version for answer in load.answers} == {version_of("0")}
        assert not load.lost()
        check_the_handlers(first)

        killed = time.monotonic()
        replicas()[0].kill()
        load.wait_for(200)
        lost = load.lost()
        print(f"killed: {len(lost)} of {len(load.answers)} requests lost, {Counter(one.status for one in lost)}")
        assert len(lost) <= CLIENTS
        assert all(one.status in (500, 503) and one.ended >= killed and one.again == 200 for one in lost)
        until_whole(REPLICAS)

        started_at, before = time.monotonic(), len(load.answers)
        with serve(toys["new"], address, port, *expected) as second:
            print(f"replaced within {time.monotonic() - started_at:.0f} s, under {len(load.answers) - before} requests")
            assert first.wait(60) == 0
            done = time.monotonic()
            load.wait_for(100)
            assert {answer.version for answer in load.since(done)} == {version_of("b")}
            assert {answer.version for answer in load.answers if answer.status == 200} == {
                version_of("0"),
                version_of("b"),
            }
            assert load.lost() == lost, "the replacement lost requests"

            code, said = attempt(toys["damaged"], address, port, *expected)
            assert code == 1, said
            assert "denoiser" in said
            load.wait_for(100)
            assert {answer.version for answer in load.since(done)} == {version_of("b")}
            assert load.lost() == lost, "the replacement that failed lost requests"
            until_whole(REPLICAS)

            load.wait_for(20)
            told = time.monotonic()
            assert second.end(signal.SIGTERM, 120) == 0
        assert not replicas()
        cut = [one for one in load.lost()[len(lost) :] if one.asked < told]
        assert not cut, "what was accepted was not answered"
        print(f"{len(load.answers)} requests, {len(lost)} lost")


def attempt(bundle: Path, address: str, port: int, *more: str) -> tuple[int, str]:
    """A command that is to end by itself: its code, and what it said."""
    command = [sys.executable, "-m", "densegeo", "serve", str(bundle), "--port", str(port), "--ray", address, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=WITHIN_S)
    return done.returncode, " ".join(done.stderr.split())


def until_whole(count: int) -> None:
    deadline = time.monotonic() + WITHIN_S
    while len(replicas()) != count:
        assert time.monotonic() < deadline, replicas()
        time.sleep(0.2)


def check_the_handlers(server: Started) -> None:
    """Routes, errors, metrics and readiness are those of `densegeo serve`."""
    assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
    assert httpx.get(f"{server.url}/v2/models/toy").json()["name"] == "toy"
    assert "<title>" in httpx.get(f"{server.url}/").text
    named = httpx.get(f"{server.url}/v2", headers={"X-Request-ID": "mine"})
    assert named.headers.get_list("x-request-id") == ["mine"]
    wrong = httpx.post(f"{server.url}/v2/models/toy/infer", content=b"{}")
    assert (wrong.status_code, wrong.json()["type"]) == (400, "RequestError")
    assert httpx.get(f"{server.url}/v2/models/other").status_code == 404
    refused = httpx.post(f"{server.url}/v2/repository/models/toy/load")
    assert (refused.status_code, "--ray" in refused.json()["error"]) == (400, True)
    actual = metrics(server.url)
    ready = {name: value for name, value in actual.items() if name.startswith("densegeo_ready{")}
    assert len(ready) == REPLICAS, "one a replica"
    assert set(ready.values()) == {1.0}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_this_machine_alone(toys: dict[str, Path]) -> None:
    """--ray local: served, and ended by SIGTERM with all of Ray's processes."""
    before = {process.pid for process in replicas()}
    with started(toys["old"], "--ray", "local", port=free_port(), within_s=WITHIN_S, **environment()) as server:
        body, headers = request(pixels(0.5))
        assert httpx.post(f"{server.url}/v2/models/toy/infer", content=body, headers=headers).status_code == 200
        assert server.end(signal.SIGTERM, 120) == 0
    assert {process.pid for process in replicas()} <= before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_config_file_as_kuberay_hands_it_over(address: str, toys: dict[str, Path], tmp_path: Path) -> None:
    """Ray Serve's own command takes what stands in deploy/kubernetes/serve-ray.yaml, with a bundle of this machine."""
    (service,) = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "serve-ray.yaml").read_text())
    config, port = yaml.safe_load(service["spec"]["serveConfigV2"]), free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] = {"serve": shlex.join([str(toys["old"]), "--threads", "1"])}
    file, url = tmp_path / "config.yaml", f"http://127.0.0.1:{port}"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file), "--address", address]
    run = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WITHIN_S
        while True:
            assert run.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/v2/health/ready").status_code == 200:
                    break
            time.sleep(0.5)
        body, headers = request(pixels(0.5))
        assert httpx.post(f"{url}/v2/models/toy/infer", content=body, headers=headers).status_code == 200
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(60)
