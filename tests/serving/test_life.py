"""A server's life: queue and limits, clients that leave, bundles that are replaced, backends that hang, signals."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from densegeo.runtime import Estimator
from densegeo.serving import server as server_module
from densegeo.serving import tracing
from densegeo.serving.server import EXIT_INTERRUPTED
from densegeo.signals import EXIT_HUNG
from tests.support.doubles import Gate, fake_estimator
from tests.support.grey_requests import HEADER, infer, level_in, other_version, pixels, request
from tests.support.serving import Opens, Served, metrics, served, started, until


def held(gate: Gate, **options: Any) -> Opens:
    """Estimators whose encoder waits at a gate."""
    return lambda directory: fake_estimator(
        directory, lambda bucket, stage, value: stage == "encoder" and gate(value), **options
    )


def test_a_full_queue_and_a_missed_deadline(toy_bundle: Path) -> None:
    gate = Gate()
    with served(toy_bundle, held(gate, max_queue=2)) as server, ThreadPoolExecutor(8) as threads:
        running = threads.submit(infer, server, 0.5)
        gate.wait_until_entered()
        late = threads.submit(infer, server, 0.55, timeout=3_000_000)  # microseconds
        waiting = threads.submit(infer, server, 0.6)
        until(lambda: metrics(server.url)['densegeo_requests_accepted_total{model="bundle"}'] == 3, "three in")
        full = infer(server, 0.65)
        assert (full.status_code, full.json()["type"]) == (503, "QueueFullError")
        assert full.headers["retry-after"] == "1"
        time.sleep(3.1)
        gate.open()
        assert (late.result().status_code, late.result().json()["type"]) == (504, "DeadlineError")
        assert level_in(running.result()) == pytest.approx(0.5, abs=2e-3)
        assert level_in(waiting.result()) == pytest.approx(0.6, abs=2e-3)
        counts = metrics(server.url)
        assert counts['densegeo_http_rejected_total{reason="queue_full"}'] == 1
        assert counts['densegeo_http_rejected_total{reason="deadline"}'] == 1


def test_a_batch_that_does_not_fit_leaves_nothing_behind(toy_bundle: Path) -> None:
    gate = Gate()
    with served(toy_bundle, held(gate, max_queue=4)) as server, ThreadPoolExecutor(8) as threads:
        running = threads.submit(infer, server, 0.5)
        gate.wait_until_entered()
        first = threads.submit(infer, server, 0.55)
        until(lambda: metrics(server.url)['densegeo_requests_accepted_total{model="bundle"}'] == 2, "two in")
        body, headers = request(np.stack([pixels(0.6)] * 4))
        answer = httpx.post(f"{server.url}/v2/models/bundle/infer", content=body, headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (503, "QueueFullError")
        counts = metrics(server.url)
        assert counts['densegeo_requests_cancelled_total{model="bundle"}'] == 3  # those that had got in
        gate.open()
        assert [threaded.result().status_code for threaded in (running, first)] == [200, 200]
        assert len(gate.calls) == 2


def test_too_many_at_once(toy_bundle: Path) -> None:
    gate = Gate()
    with served(toy_bundle, held(gate), max_requests=2) as server, ThreadPoolExecutor(8) as threads:
        first = [threads.submit(infer, server, 0.5)]
        gate.wait_until_entered()
        first.append(threads.submit(infer, server, 0.5))
        until(lambda: server.service.models["bundle"].current.metrics.snapshot().counters["accepted"] == 2, "two in")
        busy = infer(server, 0.5)
        assert (busy.status_code, busy.json()["type"], busy.headers["retry-after"]) == (503, "BusyError", "1")
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200  # probes are always answered
        gate.open()
        assert [answer.result().status_code for answer in first] == [200, 200]


def test_clients_that_leave_are_cancelled(toy_bundle: Path) -> None:
    gate = Gate()
    with served(toy_bundle, held(gate)) as server, ThreadPoolExecutor(8) as threads:
        running = threads.submit(infer, server, 0.5)
        gate.wait_until_entered()
        body, headers = request(pixels(0.6))
        head = f"POST /v2/models/bundle/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += f"{HEADER}: {headers[HEADER]}\r\n\r\n"
        accepted = server.service.models["bundle"].current.metrics.snapshot
        for number in range(3):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head.encode() + body)
                until(lambda n=number: accepted().counters["accepted"] == n + 2, "accepted")  # type: ignore[misc]
        until(lambda: accepted().counters["cancelled"] == 3, "cancelled")
        gate.open()
        assert running.result().status_code == 200
        assert len(gate.calls) == 1  # nothing was computed for nobody
        until(
            lambda: sum(v for k, v in metrics(server.url).items() if k.startswith("densegeo_http_gone_total")) == 3, "3"
        )


def test_a_failing_backend(toy_bundle: Path) -> None:
    def fail(bucket: object, stage: str, value: float) -> None:
        if value > 0.2:  # of rgb in [-1, 1]
            raise RuntimeError("no memory")

    with served(toy_bundle, lambda directory: fake_estimator(directory, fail)) as server:
        bad = infer(server, 0.7)
        assert (bad.status_code, bad.json()["type"]) == (500, "BackendError")
        assert "no memory" in bad.json()["error"]
        assert infer(server, 0.55).status_code == 200
        assert server.service.ready


def test_a_hanging_backend_ends_the_server(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HUNG_GRACE_S", 5.0)  # time to look, on a busy machine too
    gate = Gate()
    with served(toy_bundle, held(gate, timeout_s=0.3)) as server, ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(infer, server, 0.5) for _ in range(3)]
        actual = [answer.result() for answer in answers]
        assert {answer.status_code for answer in actual} == {503}
        assert {answer.json()["type"] for answer in actual} == {"BackendTimeoutError"}
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 503
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        assert server.wait(30)
        assert server.server.exit_code == EXIT_HUNG
        gate.open()


def test_a_replaced_bundle_is_loaded_and_old_requests_end_on_the_old_one(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    gate, opened = Gate(), []

    def opens(directory: Path) -> Estimator:
        opened.append(held(gate, keep_replaced=True)(directory))
        return opened[-1]

    def version(answer: httpx.Response) -> str:
        return str(json.loads(answer.content[: int(answer.headers[HEADER])])["model_version"])

    with served(bundle, opens) as server, ThreadPoolExecutor(8) as threads:
        old = [threads.submit(infer, server, 0.5) for _ in range(4)]
        until(lambda: opened[0].metrics.snapshot().counters["accepted"] == 4, "all in")
        other_version(bundle, "b")
        assert httpx.post(f"{server.url}/v2/repository/models/bundle/load").status_code == 200
        new = threads.submit(infer, server, 0.6)
        until(lambda: opened[1].metrics.snapshot().counters["accepted"] == 1, "on the new one")
        assert httpx.get(f"{server.url}/v2/models/bundle/versions/{'0' * 12}").status_code == 404
        assert not opened[0]._backend.closed
        gate.open()
        assert {version(answer.result()) for answer in old} == {"0" * 12}
        assert version(new.result()) == "b" * 12
        until(lambda: opened[0]._backend.closed, "the old one is released")
        (bundle / "manifest.json").write_text("{}")
        failed = httpx.post(f"{server.url}/v2/repository/models/bundle/load")
        assert (failed.status_code, failed.json()["type"]) == (400, "BundleError")
        assert version(infer(server, 0.6)) == "b" * 12


@pytest.mark.integration
@pytest.mark.parametrize("connections", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_sigterm_under_load_loses_nothing(toy_bundle: Path, connections: int) -> None:
    """All that was sent on a connection is answered; then connections are refused, and the process ends with 0."""
    with started(toy_bundle, "--drain", "0.5", "--max-queue", str(connections)) as server:
        body, headers = request(pixels(0.5))
        codes: list[int] = []
        lost: list[Exception] = []

        def load() -> None:
            with httpx.Client(base_url=server.url) as client:
                while True:
                    try:
                        codes.append(client.post("/v2/models/bundle/infer", content=body, headers=headers).status_code)
                    except httpx.ConnectError:
                        return
                    except httpx.HTTPError as error:
                        lost.append(error)
                        return

        threads = [threading.Thread(target=load) for _ in range(connections)]
        for thread in threads:
            thread.start()
        until(lambda: len(codes) > 6 * connections, "load")
        assert server.end(signal.SIGTERM) == 0
        for thread in threads:
            thread.join(30)
        assert set(codes) == {200}
        assert lost == []
        logged = [line for line in server.log if line["message"] == "request"]
        assert len([line for line in logged if line["status"] == 200]) == len(codes)
        assert server.log[-1]["message"] == "ended"


@pytest.mark.thorough
@pytest.mark.integration
def test_a_hang_ends_the_process() -> None:
    """No run of real networks is over within a hundredth of a second, so that to the server each hangs."""
    with started("fe2e-tiny", "--timeout", "0.01") as server:
        answer = infer(server, 0.5, "fe2e-tiny")
        assert (answer.status_code, answer.json()["type"]) == (503, "BackendTimeoutError")
        assert server.wait() == EXIT_HUNG
        assert any(line.get("exit_code") == EXIT_HUNG for line in server.log)


@pytest.mark.integration
def test_interrupted_and_wrong(toy_bundle: Path, tmp_path: Path) -> None:
    with started(toy_bundle, "--drain", "0") as server:
        infer(server, 0.5, toy_bundle.name, near=3000.0, far=4000.0)
        assert server.end(signal.SIGINT) == EXIT_INTERRUPTED
        assert all("level" in line for line in server.log), server.log  # JSON, also of what was warned of
        assert ["millimetres" in line["warnings"][0] for line in server.log if "warnings" in line] == [True]
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("short")
    with pytest.raises(AssertionError, match="openssl rand"):
        started(toy_bundle, "--token-file", token).__enter__()


def test_log_lines_and_ids(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "densegeo.serving"):
        body, headers = request(pixels(0.5))
        url = f"{server.url}/v2/models/bundle/infer"
        for given, kept in (("abc-1", True), ("x" * 129, False), ("", False), ("two words", False)):
            answer = httpx.post(url, content=body, headers=headers | {"X-Request-ID": given})
            assert (answer.headers["x-request-id"] == given) == kept
        assert httpx.get(f"{server.url}/nope").headers["x-request-id"]
        until(lambda: len(caplog.records) >= 5, "a line a request, each written after its answer")
    lines = [record.densegeo_fields for record in caplog.records]
    assert lines[0]["request_id"] == "abc-1"
    assert (lines[0]["model"], lines[0]["status"], lines[0]["images"]) == ("bundle", 200, 1)
    assert lines[0]["route"] == "/v2/models/{model}/infer"
    assert (lines[-1]["status"], lines[-1]["error"], lines[-1]["route"]) == (404, "NotFoundError", "unknown")


def test_spans(toy_bundle: Path) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with served(toy_bundle) as server:
        body, headers = request(pixels(0.5))
        url = f"{server.url}/v2/models/bundle/infer"
        assert httpx.post(url, content=body, headers=headers | {"traceparent": parent}).status_code == 200
    spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans["POST /v2/models/{model}/infer"]
    assert f"{whole.context.trace_id:032x}" == parent[3:35]
    assert whole.attributes["http.response.status_code"] == 200
    for stage in ("load", "queue", "encoder", "denoiser", "decoder", "finish"):
        assert spans[stage].parent.span_id == whole.context.span_id


def test_without_opentelemetry_there_are_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(tracing, "import_module", absent)
    spans = tracing.Tracing()
    with spans.request("GET", {}, {}) as span:
        assert span is None
        spans.stages({"load": 1.0})


def test_an_error_that_nobody_foresaw(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*given: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(server.service, "estimate", broken)
    answer = infer(server, 0.5)
    assert (answer.status_code, answer.json()["type"]) == (500, "InternalError")
    assert answer.headers["x-request-id"] in answer.json()["error"]
    assert "inside" not in answer.text


def test_nothing_is_left_in_the_loop(toy_bundle: Path) -> None:
    """Tasks end with their requests."""
    with served(toy_bundle) as server:
        for _ in range(5):
            assert infer(server, 0.5).status_code == 200
        loop = server.server._loop
        assert loop is not None
        until(lambda: len(asyncio.all_tasks(loop)) == 1, "only the server's own task is left")
