"""Downloads through huggingface_hub from a hub served on this machine: revision pinned, digest recorded."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from densegeo.errors import CheckpointError
from densegeo.export.sources import SourceOptions, resolve
from densegeo.models.families import FE2E
from densegeo.models.presets import AUTHORS_FILES, write_random_checkpoint
from densegeo.runtime.bundle import read_manifest
from tests.support.checkpoints import CONFIG, SMALL, SMALL_VAE
from tests.support.traced_graphs import command

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a server that speaks as much of the hub's protocol as a download needs."""
    folder = tmp_path / "published"
    write_random_checkpoint(folder, SMALL, SMALL_VAE, text_tokens=5, valid_tokens=2, seed=1)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/acme/fe2e"):
                siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                content = json.dumps({"id": "acme/fe2e", "sha": COMMIT, "siblings": siblings}).encode()
                headers = {"Content-Type": "application/json"}
            elif path.startswith(f"/acme/fe2e/resolve/{COMMIT}/") and (folder / Path(path).name).is_file():
                content = (folder / Path(path).name).read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()


def build_from_hub(
    address: str, graphs: Path, tmp_path: Path, repository: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    config = tmp_path / "config.json"
    config.write_text(CONFIG)
    output = tmp_path / "bundle"
    words = [*command(graphs), "build", "--model", "fe2e", "--checkpoint", repository, "--no-lora"]
    words += ["--config", str(config), "--size", "48x32", "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    ), output


@pytest.mark.thorough
def test_a_repository_is_downloaded_at_a_pinned_commit(hub, graphs_once, tmp_path):
    address, folder = hub
    result, output = build_from_hub(address, graphs_once, tmp_path, "acme/fe2e")
    assert result.returncode == 0, result.stdout + result.stderr
    sources = {source.role: source for source in read_manifest(output).sources}
    name = AUTHORS_FILES["dit"][0]
    assert sources["dit"].path == f"acme/fe2e@{COMMIT}:{name}"
    assert sources["dit"].sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.thorough
def test_an_unknown_repository_is_one_clear_line(hub, graphs_once, tmp_path):
    result, output = build_from_hub(hub[0], graphs_once, tmp_path, "acme/nothing")
    assert result.returncode == 1
    assert "cannot download acme/nothing" in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not output.exists()


def test_a_name_that_is_neither_file_nor_repository(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(SourceOptions(dit=str(tmp_path / "missing.safetensors")), FE2E)
    with pytest.raises(CheckpointError, match="is a directory"):
        resolve(SourceOptions(dit=str(tmp_path)), FE2E)
    with pytest.raises(CheckpointError, match="neither a directory nor a repository"):
        resolve(SourceOptions(checkpoint="not/a/repository"), FE2E)
