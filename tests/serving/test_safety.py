"""What is refused: wrong names, sizes, tokens, origins, hosts; bombs, stalling clients, foreign bundles."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import trustme
from PIL import Image

from densegeo.cli import main
from densegeo.errors import BundleError, ConfigError, ResourceError
from densegeo.runtime import Estimator
from densegeo.serving.models import Model
from densegeo.serving.options import Options, read_token
from densegeo.serving.server import listen
from tests.support.serving import Served, metrics, served

TOKEN = b"0123456789abcdef-a-token"
LIMIT = 100_000


@pytest.fixture(scope="module")
def strict(toy_bundle: Path) -> Iterator[Served]:
    """Small limits, a token."""
    options = {"max_body": LIMIT, "max_pixels": 5_000, "body_s": 0.4, "header_s": 0.4, "write_s": 0.4}
    with served(
        toy_bundle,
        lambda directory: Estimator(directory, device="cpu", max_pixels=5_000),
        token=TOKEN,
        origins=frozenset({"https://good.example"}),
        **options,
    ) as running:
        yield running


def allowed(**more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN.decode()}"} | more


def infer(server: Served, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v2/models/bundle/infer", content=content, headers=allowed(**headers))


def raw(server: Served, content: bytes, seconds: float = 5.0) -> bytes:
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(content)
        actual = b""
        try:
            while part := connection.recv(65536):
                actual += part
        except ConnectionResetError:
            return actual
        return actual


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2f..%2fetc", "bundle%2f..", "%2e%2e%2fbundle", "bundle%00", "C:%5cbundle", "b%C3%BCndle"],
)
def test_a_name_is_never_a_path(strict: Served, name: str) -> None:
    for path in (f"/v2/models/{name}", f"/page/{name}", f"/v2/models/bundle/versions/{name}"):
        answer = raw(
            strict,
            f"GET {path} HTTP/1.1\r\nHost: x\r\n".replace("Host: x", "Host: 127.0.0.1").encode()
            + b"Authorization: Bearer "
            + TOKEN
            + b"\r\nConnection: close\r\n\r\n",
        )
        assert answer.startswith(b"HTTP/1.1 404"), (path, answer)
        assert b"NotFoundError" in answer


def test_page_files_are_named_ones(strict: Served) -> None:
    for name in ("../options.py", "%2e%2e/options.py", "..%2foptions.py", "/etc/passwd", "index.html/", ".", ""):
        answer = raw(strict, f"GET /page/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 401")), (name, answer)


@pytest.mark.parametrize("header", [None, "Bearer wrong-token-0123456789", "Basic eDp5", "Bearer", "Bearer \xff"])
def test_the_token_is_wanted(strict: Served, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for method, path in (("GET", "/v2"), ("GET", "/metrics"), ("POST", "/v2/models/bundle/infer"), ("GET", "/nope")):
        answer = httpx.request(method, strict.url + path, headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (401, "UnauthorizedError")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{strict.url}/v2", headers=allowed()).status_code == 200
    for path in ("/", "/v2/health/live", "/v2/health/ready", "/docs"):
        assert httpx.get(strict.url + path).status_code == 200


def test_a_token_is_long_and_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(0o600)
    for content in (b"", b"short\n", b"two words are not a token", b"\xff" * 20):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="openssl rand"):
            read_token(path)
    path.write_bytes(TOKEN + b"\n")
    assert read_token(path) == TOKEN
    path.chmod(0o604)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 604\): say `chmod 600 .*token`"):
        read_token(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_pages_of_other_origins_may_not_ask(strict: Served) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "https://good.example.evil.example"):
        for method, path in (("POST", "/v2/repository/models/bundle/load"), ("GET", "/v2"), ("OPTIONS", "/v2")):
            answer = httpx.request(method, strict.url + path, headers=allowed(Origin=origin))
            assert (answer.status_code, answer.json()["type"]) == (403, "ForbiddenError"), (origin, method)
            assert "access-control-allow-origin" not in answer.headers
    good = httpx.get(f"{strict.url}/v2", headers=allowed(Origin="https://good.example"))
    assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, "https://good.example")
    asked = httpx.options(f"{strict.url}/v2", headers={"Origin": "https://good.example"})
    assert (asked.status_code, "Authorization" in asked.headers["access-control-allow-headers"]) == (204, True)
    own = httpx.get(f"{strict.url}/v2", headers=allowed(Origin=strict.url))
    assert (own.status_code, "access-control-allow-origin" in own.headers) == (200, False)


def test_other_names_do_not_lead_here(strict: Served) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", ""):
        answer = httpx.get(f"{strict.url}/v2", headers=allowed(Host=host))
        assert (answer.status_code, answer.json()["type"]) == (403, "ForbiddenError"), host
    for host in ("localhost", "127.0.0.1:9", "[::1]:9", "[::1]", "LOCALHOST:1"):
        assert httpx.get(f"{strict.url}/v2", headers=allowed(Host=host)).status_code == 200


def test_large_bodies(strict: Served) -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 10_000

    url = f"{strict.url}/v2/models/bundle/infer"
    for answer in (
        infer(strict, b"x" * (LIMIT + 1)),
        httpx.post(url, content=stream(), headers=allowed()),
        httpx.post(f"{strict.url}/v1/geometry", files={"image": b"x" * LIMIT}, headers=allowed()),
    ):
        assert (answer.status_code, answer.json()["type"]) == (413, "BodyTooLargeError")
    assert infer(strict, b"x" * LIMIT).status_code == 400


def test_bombs(strict: Served) -> None:
    zeros = gzip.compress(b"0" * 50_000_000)
    assert len(zeros) < LIMIT
    for content in (zeros, gzip.compress(b"0" * (LIMIT + 1))):
        answer = infer(strict, content, **{"Content-Encoding": "gzip"})
        assert (answer.status_code, answer.json()["type"]) == (413, "BodyTooLargeError")
    stream = io.BytesIO()
    Image.new("L", (3000, 3000)).save(stream, "PNG")
    assert len(stream.getvalue()) < LIMIT
    answer = httpx.post(f"{strict.url}/v1/geometry", files={"image": stream.getvalue()}, headers=allowed())
    assert (answer.status_code, answer.json()["type"]) == (413, "ImageTooLargeError")


def test_clients_that_stall(strict: Served) -> None:
    host = b"Host: localhost\r\nAuthorization: Bearer " + TOKEN + b"\r\n"
    post = b"POST /v2/models/bundle/infer HTTP/1.1\r\n" + host
    begun = time.monotonic()
    assert raw(strict, b"") == b""  # says nothing
    assert raw(strict, b"GET /v2 HTTP/1.1\r\nHost: local") == b""  # half a head
    answer = raw(strict, post + b"Content-Length: 100\r\nConnection: close\r\n\r\n{")  # a body that does not end
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"SlowRequestError" in answer
    assert time.monotonic() - begun < 4.5
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:  # a byte now and then
        connection.sendall(post + b"Content-Length: 100\r\n\r\n")
        begun, actual = time.monotonic(), b""
        connection.settimeout(0.05)
        while not actual and time.monotonic() - begun < 4:
            connection.sendall(b" ")
            try:
                actual = connection.recv(65536)
            except TimeoutError:
                continue
        assert actual.startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_its_answer_is_dropped(toy_bundle: Path) -> None:
    def connections() -> int:
        return len(running.server.server_state.connections)

    with served(toy_bundle, write_s=0.3, idle_s=60) as running:
        content = np.zeros((1000, 1500, 3), np.uint8).tobytes()  # 24 MB come back
        header = (
            b'{"inputs":[{"name":"image","shape":[1000,1500,3],"datatype":"UINT8","parameters":{"binary_data_size":'
            + str(len(content)).encode()
            + b'}}],"parameters":{"binary_data_output":true}}'
        )
        head = "POST /v2/models/bundle/infer HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Length: {len(header) + len(content)}\r\n"
        head += f"Inference-Header-Content-Length: {len(header)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as connection:
            connection.sendall(head.encode() + header + content)
            time.sleep(0.2)
            assert connections() == 1
            deadline = time.monotonic() + 10
            while connections() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert connections() == 0


def test_rejections_are_counted_by_reason(strict: Served) -> None:
    before = metrics(strict.url, **allowed())
    httpx.get(f"{strict.url}/v2")
    httpx.get(f"{strict.url}/nope", headers=allowed())
    infer(strict, b"x" * (LIMIT + 1))
    after = metrics(strict.url, **allowed())
    for reason in ("unauthorized", "not_found", "too_large"):
        name = f'densegeo_http_rejected_total{{reason="{reason}"}}'
        assert after[name] == before[name] + 1


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_a_bundle_that_others_may_write_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "mine"
    shutil.copytree(toy_bundle, bundle)
    bundle.chmod(0o755)
    model = Model(bundle, lambda directory: Estimator(directory, device="cpu"))
    for path, mode in ((bundle / "manifest.json", 0o666), (bundle, 0o777)):
        kept = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(BundleError, match=r"written by everybody: say `chmod -R o-w"):
            model.load()
        path.chmod(kept)
    if os.geteuid() == 0:
        os.chown(bundle / "manifest.json", 12345, 0)
        with pytest.raises(BundleError, match="belongs to another user"):
            model.load()
        os.chown(bundle / "manifest.json", 0, 12345)
        (bundle / "manifest.json").chmod(0o664)
        with pytest.raises(BundleError, match="written by a group"):
            model.load()
        os.chown(bundle / "manifest.json", 0, 0)
    model.load()
    (bundle / "manifest.json").chmod(0o666)
    with served(toy_bundle) as running:
        running.service.models["mine"] = model
        answer = httpx.post(f"{running.url}/v2/repository/models/mine/load")
        assert (answer.status_code, answer.json()["type"]) == (400, "BundleError")
        assert httpx.get(f"{running.url}/v2/models/mine/ready").status_code == 200  # the old one stays


def test_tls(toy_bundle: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    certificate, key, root = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    issued.private_key_pem.write_to_path(key)
    for part in issued.cert_chain_pems:
        part.write_to_path(certificate, append=True)
    authority.cert_pem.write_to_path(root)
    with served(toy_bundle, tls_certificate=certificate, tls_key=key) as running:
        import ssl

        context = ssl.create_default_context(cafile=str(root))
        assert httpx.get(f"{running.url}/v2/health/ready", verify=context).status_code == 200
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{running.url}/v2/health/ready")
    other = tmp_path / "other.pem"
    authority.issue_cert("localhost").private_key_pem.write_to_path(other)
    cut = tmp_path / "cut.pem"
    cut.write_bytes(key.read_bytes()[:200])
    for files, says in (
        ((certificate, tmp_path / "none.pem"), "--tls-key .*none.pem cannot be read: No such file"),
        ((key, key), "--tls-certificate .*key.pem is no PEM file with a certificate"),
        ((certificate, certificate), "--tls-key .* is no PEM file with a private key"),
        ((certificate, other), "other.pem is not the key of .*chain.pem"),
        ((certificate, cut), "cannot be used: .*without a password"),
    ):
        chosen = {"tls_certificate": files[0], "tls_key": files[1]}
        with pytest.raises(ConfigError, match=says), served(toy_bundle, **chosen):
            pass


def test_options_are_checked() -> None:
    for options in (
        {"port": -1},
        {"max_body": 0},
        {"body_s": 0.0},
        {"drain_s": float("inf")},
        {"tls_key": Path("key")},
        {"origins": frozenset({"*"})},
        {"origins": frozenset({"https://a/b"})},
    ):
        with pytest.raises(ConfigError):
            Options(**options)  # type: ignore[arg-type]
    assert Options().loopback
    assert not Options(host="0.0.0.0").loopback
    taken = listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(ResourceError, match="Cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "-1"], "'--port'"),
        (["--max-requests", "0"], "'--max-requests'"),
        (["--threads", "0"], "'--threads'"),
        (["--timeout", "nan"], "'--timeout': must be above 0"),
        (["--body-timeout", "inf"], "'--body-timeout': must be above 0"),
        (["--max-wait-ms", "-1"], "'--max-wait-ms': must be 0 or more"),
        (["--drain", "-1"], "'--drain': must be 0 or more"),
        (["--backend", "tf"], "There is no 'tf'"),
        (["--device", "tpu"], "'--device'"),
        (["--tls-key", "none.pem"], "--tls-certificate and --tls-key"),
        (["--token-file", "none"], "The token file none cannot be read"),
        (["nobundle"], "nobundle is not a densegeo bundle"),
        (["fe2e-tiny"], "Two bundles are called fe2e-tiny"),
    ],
)
def test_wrong_options_end_with_2(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("densegeo.serving.command.start_logging", lambda: None)  # it would be this process's
    with pytest.raises(SystemExit) as ended:
        main(["serve", "fe2e-tiny", *options])
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
