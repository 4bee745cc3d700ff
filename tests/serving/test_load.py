"""Many requests, good and bad, at once: each is answered exactly once or cancelled, nothing grows, nothing is a 500
but what a failing backend makes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densegeo.runtime import Estimator
from densegeo.signals import EXIT_HUNG
from tests.support.doubles import Gate, fake_estimator
from tests.support.http_load import inference, load
from tests.support.serving import Served, metrics, served

GROWTH = 24 * 2**20  # bytes that the process may grow by from the first quarter to the end


def resident() -> int:
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def failing(directory: Path) -> Estimator:
    """A backend that fails on every fourth picture or so."""

    def fail(bucket: object, stage: str, value: float) -> None:
        if stage == "encoder" and round(1e4 * value) % 4 == 0:
            raise RuntimeError("out of luck")

    return fake_estimator(directory, fail)


@pytest.mark.parametrize(
    ("requests", "connections"),
    [
        pytest.param(480, 16, marks=pytest.mark.thorough),
        pytest.param(10_000, 64, marks=pytest.mark.slow),
    ],
)
def test_every_request_ends_once(toy_bundle: Path, tmp_path: Path, requests: int, connections: int) -> None:
    for name in ("fails", "hangs"):
        (tmp_path / name).symlink_to(toy_bundle)
    gate = Gate()

    def opens(directory: Path) -> Estimator:
        if directory.name == "fails":
            return failing(directory)
        if directory.name == "hangs":
            hook = lambda bucket, stage, value: gate(value)  # noqa: E731
            return fake_estimator(directory, hook, timeout_s=1.0)
        return Estimator(directory, device="cpu", max_queue=connections)

    bundles = [toy_bundle, tmp_path / "fails", tmp_path / "hangs"]
    with served(bundles, opens, body_s=0.5) as server:
        first = asyncio.run(load(server.port, ("bundle", "fails"), requests // 4, connections))
        before = resident()
        rest = asyncio.run(load(server.port, ("bundle", "fails"), requests - requests // 4, connections))
        grown = resident() - before
        ends = first.ends + rest.ends
        print(dict(ends), f"grown by {grown / 2**20:.1f} MiB")
        assert sum(ends.values()) == first.sent + rest.sent >= requests * 0.95
        for (kind, end), _ in ends.items():
            allowed = {
                "good": {"200", "500"},
                "bad": {"400"},
                "leaves": {"left"},
                "slow": {"200", "500", "408"},
            }
            assert end in allowed[kind], (kind, end)
        assert {end for _, end in ends} == {"200", "400", "408", "500", "left"}
        counts = metrics(server.url)
        seen = sum(value for name, value in counts.items() if name.startswith("densegeo_http_requests_total"))
        gone = sum(value for name, value in counts.items() if name.startswith("densegeo_http_gone_total"))
        assert seen + gone <= sum(ends.values())  # who left may have left before anything was read
        assert seen >= sum(count for (kind, _), count in ends.items() if kind != "leaves")
        for name in ("bundle", "fails"):
            model = {
                kind: counts[f'densegeo_requests_{kind}_total{{model="{name}"}}']
                for kind in ("accepted", "completed", "failed", "expired", "cancelled")
            }
            assert model["accepted"] == sum(model.values()) - model["accepted"], model
        assert grown < GROWTH
        # and then a backend hangs: what is on its way is answered or refused, and the server ends
        body, length = inference(0.6)
        stuck = threading.Thread(
            target=httpx.post,
            args=(f"{server.url}/v2/models/hangs/infer",),
            kwargs={"content": body, "headers": {"Inference-Header-Content-Length": str(length)}, "timeout": 30},
        )
        stuck.start()
        last = asyncio.run(load(server.port, ("bundle",), 8 * connections, connections))
        stuck.join(30)
        assert server.wait(30)
        assert server.server.exit_code == EXIT_HUNG
        assert sum(last.ends.values()) == last.sent
        gate.open()


METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"TRACE"])
PATHS = st.sampled_from([b"/v2", b"/v2/models/bundle/infer", b"/v1/geometry", b"/v2/repository/index", b"/x"])
NAMES = st.sampled_from(
    [
        "Content-Type",
        "Content-Encoding",
        "Inference-Header-Content-Length",
        "Accept",
        "Accept-Encoding",
        "Origin",
        "Authorization",
        "X-Request-ID",
        "Expect",
        "Transfer-Encoding",
        "Connection",
        "traceparent",
        "Content-Length",
    ]
)
KNOWN = st.sampled_from(
    [
        "gzip",
        "deflate",
        "chunked",
        "0",
        "1",
        "200",
        "99999999999",
        "multipart/form-data;boundary=x",
        "*/*",
        "100-continue",
        "close",
        "bytes",
        "application/json",
    ]
)
HEADERS = st.lists(
    st.tuples(
        NAMES,
        st.one_of(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40), KNOWN),
    ),
    max_size=5,
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just(2**70)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
TENSORS = st.fixed_dictionaries(
    {"name": st.one_of(st.just("image"), VALUES), "shape": st.one_of(st.just([16, 16, 3]), VALUES)},
    optional={
        "datatype": st.one_of(st.just("UINT8"), VALUES),
        "data": st.one_of(st.just([1] * 768), VALUES),
        "parameters": st.one_of(st.just({"binary_data_size": 768}), VALUES),
    },
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["near", "far", "scale", "shift", "anchors", "timeout", "binary_data_output", "priority"]), VALUES,
    max_size=3,
)  # fmt: skip
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.one_of(st.lists(TENSORS, max_size=2), VALUES)},
    optional={"id": VALUES, "parameters": st.one_of(PARAMETERS, VALUES), "outputs": VALUES},
)
BODIES = st.one_of(
    st.binary(max_size=200),
    REQUESTS.map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda name, value, file: (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n' + file
            + b'\r\n--x\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value + b"\r\n--x--\r\n"
        ),
        st.sampled_from([b"near", b"far", b"anchors", b"model", b"intrinsics", b"outputs", b"deadline_ms", b"image"]),
        st.binary(max_size=20),
        st.binary(max_size=60),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def quick(toy_bundle: Path) -> Any:
    with served(toy_bundle, body_s=0.2, header_s=0.2, idle_s=1) as running:
        yield running
        body, length = inference(0.6)
        headers = [("Inference-Header-Content-Length", str(length)), ("Connection", "close")]
        assert exchange(running, b"POST", b"/v2/models/bundle/infer", headers, body).startswith(b"HTTP/1.1 200")


def exchange(server: Served, method: bytes, path: bytes, headers: list[tuple[str, str]], body: bytes) -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: localhost"]
    lines += [f"{name}: {value}".encode() for name, value in headers]
    if not {"content-length", "transfer-encoding"} & {name.lower() for name, _ in headers}:
        lines.append(b"Content-Length: %d" % len(body))
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        actual = b""
        try:
            while b"\r\n\r\n" not in actual and (part := connection.recv(65536)):
                actual += part
        except ConnectionResetError:
            pass
        return actual


def check(server: Served, *request: Any) -> None:
    answer = exchange(server, *request)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer
    missed = answer.startswith(b"HTTP/1.1 504") and any(name in request[-1] for name in (b"deadline_ms", b"timeout"))
    assert missed or not answer.startswith(b"HTTP/1.1 5"), answer


@pytest.mark.integration
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(method=METHODS, path=PATHS, headers=HEADERS, body=BODIES)
def test_random_requests(quick: Served, method: bytes, path: bytes, headers: Any, body: bytes) -> None:
    check(quick, method, path, headers, body)


@pytest.mark.integration
@settings(max_examples=180, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODIES, plain=st.booleans())
def test_random_bodies(quick: Served, body: bytes, plain: bool) -> None:
    kind = [("Content-Type", "multipart/form-data; boundary=x")] if plain else []
    check(quick, b"POST", b"/v1/geometry" if plain else b"/v2/models/bundle/infer", kind, body)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(method=METHODS, path=PATHS, headers=HEADERS, body=BODIES)
def test_a_thousand_random_requests(quick: Served, method: bytes, path: bytes, headers: Any, body: bytes) -> None:
    check(quick, method, path, headers, body)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODIES, plain=st.booleans())
def test_a_thousand_random_bodies(quick: Served, body: bytes, plain: bool) -> None:
    kind = [("Content-Type", "multipart/form-data; boundary=x")] if plain else []
    check(quick, b"POST", b"/v1/geometry" if plain else b"/v2/models/bundle/infer", kind, body)
